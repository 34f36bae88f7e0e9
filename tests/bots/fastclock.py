"""Run freqtrade in this process on the clock of a replay exchange: python fastclock.py URL SPEED SECONDS trade ...

Its wall clock runs SPEED times as fast as the real one, as the exchange's does. It is never ahead of that, or it would
take a bar for closed that is not whole yet. Sleeps, timeouts and time.monotonic stay real, so that threads and asyncio
work as ever. After so many real seconds it is told to stop, as by Ctrl-C.
"""
import json, os, signal, sys, threading, time
from urllib.request import urlopen

import time_machine

def exchange_time(url):
    with urlopen(f'{url}/_ctl/state', timeout=5) as answer: return json.load(answer)['now'] / 1000

def main(url, speed, seconds, *args):
    first, begun = exchange_time(url), time.perf_counter()
    def now(): return first + (time.perf_counter() - begun) * float(speed)
    def follow(clock):
        while time.perf_counter() - begun < float(seconds):
            clock.move_to(now())
            time.sleep(.02)
        os.kill(os.getpid(), signal.SIGINT)
    with time_machine.travel(now(), tick=True) as clock:
        threading.Thread(target=follow, args=(clock,), daemon=True).start()
        from freqtrade.main import main as run
        run(list(args))

if __name__ == '__main__': main(*sys.argv[1:])
