"""Settings of all tests: no screen, no network, the package of this checkout"""
import os, sys
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('OMP_NUM_THREADS', '2')
sys.path.insert(0, str(Path(__file__).parents[1]))
