"""A BERT that scores texts: against transformers itself; files that act, lie or are damaged; what strangers write; a
store that is killed, shared, flipped and full (suites 4, 5, 6, 10, 11, 14, 15)"""
import copy, json, os, pickle, random, resource, signal, socket, sqlite3, subprocess, sys, textwrap, time

import numpy as np, pandas as pd, pytest, safetensors.torch, torch
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import ended, forked, resident
from cryptoml import bert
from cryptoml.bert import (
    LABELS, LETTERS, TOKENS, WEIGHTS, BertError, Network, Parts, Reader, ScoreStore, SentimentModel,
    find_model, load_parts, read_parts, readable, save_parts, score_key, score_news)

pytest.importorskip('transformers', reason="transformers is not installed (the extra 'sentiment')")
pytestmark = pytest.mark.usefixtures('one_thread')

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz', *(f'##{c}' for c in 'aeioust'),
         'bitcoin', 'price', 'rises', 'falls', 'the', 'hack', '!', '.', ',']
FINBERT = {0: 'positive', 1: 'negative', 2: 'neutral'}

def tiny(folder, labels=FINBERT, seed=0, **sizes):
    "A random BERT with a head in a folder, as `save_pretrained` leaves it; the model of transformers"
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=32, max_position_embeddings=512) | sizes
    model = BertForSequenceClassification(BertConfig(**sizes, id2label=labels)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'vocab.txt').write_text('\n'.join(WORDS))
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(do_lower_case=True)))
    (folder/'config.json').write_text(json.dumps(model.config.to_dict()))
    safetensors.torch.save_file(model.state_dict(), folder/WEIGHTS)
    return model

@pytest.fixture
def folder(tmp_path):
    tiny(tmp_path/'model')
    return tmp_path/'model'


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bert')/'model'
    tiny(folder)
    return read_parts(folder)

def hub(tmp_path, monkeypatch, commits, main, name='ProsusAI/finbert'):
    "A cache as the hub lays it out, links to blobs included; the commits' folders"
    root = tmp_path/'hub'
    monkeypatch.setenv('HF_HUB_CACHE', str(root))
    repo = root/f"models--{name.replace('/', '--')}"
    (repo/'refs').mkdir(parents=True)
    (repo/'refs'/'main').write_text(main)
    (repo/'blobs').mkdir()
    for commit, files in commits.items():
        there = repo/'snapshots'/commit
        there.mkdir(parents=True)
        for file in files:
            blob = repo/'blobs'/f'{commit}-{file.name}'
            blob.write_bytes(file.read_bytes())
            (there/file.name).symlink_to(os.path.relpath(blob, there))
    return repo/'snapshots'

def refused(words, f, *args):
    with pytest.raises(BertError, match=words) as e: f(*args)
    assert '\n' not in str(e.value) and len(str(e.value)) < 900

# ---- the same as transformers

TEXTS = ['Bitcoin price rises!', 'the hack, at last.', 'falls ' * 700, 'a', 'ether a', 'the price of bread',
         'é ü ñ', 'rises']

def by_transformers(folder, texts):
    "Probabilities of LABELS, one text at a time, by the library's own classes and its own reading of the files"
    from transformers import BertForSequenceClassification, BertTokenizer
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = BertTokenizer(vocab=str(folder/'vocab.txt'))
    found = []
    for text in texts:
        given = tokenizer(text, truncation=True, max_length=512, return_tensors='pt')
        with torch.no_grad(): p = model(**given).logits.softmax(-1)[0]
        names = {model.config.id2label[i].lower(): float(v) for i, v in enumerate(p)}
        found.append([names[label] for label in LABELS])
    return np.array(found)

@pytest.mark.parametrize('labels', [
    FINBERT, {0: 'Negative', 1: 'Neutral', 2: 'Positive'}, {0: 'NEUTRAL', 1: 'POSITIVE', 2: 'NEGATIVE'}], ids=str)
def test_the_same_as_transformers_in_any_order_of_labels(tmp_path, labels):
    tiny(tmp_path/'model', labels)
    ours = SentimentModel(tmp_path/'model', 'cpu').score(TEXTS)
    theirs = by_transformers(tmp_path/'model', TEXTS)
    np.testing.assert_allclose(ours[list(LABELS)], theirs, atol=2e-6)
    np.testing.assert_allclose(ours.score, theirs[:, 2] - theirs[:, 0], atol=4e-6)
    assert np.ptp(theirs) > .2                                              # the model has opinions

def test_old_names_of_the_layer_norm_are_read(folder):
    "Files of 2019, FinBERT's among them, may say gamma and beta, and hold positions as a tensor"
    expected = SentimentModel(folder, 'cpu').score(TEXTS)
    old = {k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): v
           for k, v in safetensors.torch.load_file(folder/WEIGHTS).items()}
    old['bert.embeddings.position_ids'] = torch.arange(512)[None]
    safetensors.torch.save_file(old, folder/WEIGHTS)
    pd.testing.assert_frame_equal(SentimentModel(folder, 'cpu').score(TEXTS), expected)

def test_half_precision_is_read(folder):
    half = {k: v.half() for k, v in safetensors.torch.load_file(folder/WEIGHTS).items()}
    expected = SentimentModel(folder, 'cpu').score(TEXTS).score
    safetensors.torch.save_file(half, folder/WEIGHTS)
    np.testing.assert_allclose(SentimentModel(folder, 'cpu').score(TEXTS).score, expected, atol=.05)

def test_a_whole_tokenizer_is_the_vocabulary_written_out(folder):
    from transformers import BertTokenizer
    expected = SentimentModel(folder, 'cpu').score(TEXTS)
    BertTokenizer(vocab=str(folder/'vocab.txt')).save_pretrained(folder)
    assert (folder/'tokenizer.json').exists()
    (folder/'vocab.txt').unlink()
    pd.testing.assert_frame_equal(SentimentModel(folder, 'cpu').score(TEXTS), expected)

# ---- where a model is

def test_a_name_is_found_in_the_cache_of_the_hub(tmp_path, folder, monkeypatch):
    files = sorted(folder.iterdir())
    snapshots = hub(tmp_path, monkeypatch, {'abc': files, 'old': files}, 'abc')
    def never(*args): raise AssertionError('the network was used')
    monkeypatch.setattr(socket.socket, 'connect', never)
    assert find_model('ProsusAI/finbert') == snapshots/'abc'
    pd.testing.assert_frame_equal(SentimentModel(device='cpu').score(TEXTS), SentimentModel(folder, 'cpu').score(TEXTS))

def test_a_commit_with_safetensors_is_preferred(tmp_path, folder, monkeypatch):
    "As it is after the conversion was fetched: main has a pickle, another commit has both"
    (folder/'pytorch_model.bin').write_bytes(b'pickle')
    files = sorted(folder.iterdir())
    bare = [f for f in files if f.name != WEIGHTS]
    snapshots = hub(tmp_path, monkeypatch, {'main': bare, 'converted': files}, 'main')
    assert find_model('ProsusAI/finbert') == snapshots/'converted'

def test_what_is_not_here_is_said_and_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path/'nothing'))
    def never(*args): raise AssertionError('the network was used')
    monkeypatch.setattr(socket.socket, 'connect', never)
    refused('ProsusAI/finbert is not on this machine .* allow the network once', SentimentModel)

@pytest.mark.parametrize('name', [
    '../../secret', 'a/../b', 'a/b/c', 'a b/c', '', 'a\0b', '/nowhere', 'x' * 5000, '~nobody-here/x', 'a/..',
    '\ud800/x',
], ids=lambda n: ascii(n)[:20])
def test_what_is_no_name_is_refused(name): refused('is no folder, and no name in the hub', find_model, name, True)

@pytest.mark.parametrize('converted', [True, False])
def test_fetching_takes_named_files_alone_and_looks_for_a_conversion(tmp_path, folder, monkeypatch, converted):
    import huggingface_hub
    asked = []
    def snapshot(name, revision=None, **how):
        asked.append((name, revision, how['allow_patterns']))
        there = tmp_path/f'at {revision}'.replace('/', ' ')
        there.mkdir(exist_ok=True)
        for f in folder.iterdir():
            if f.name not in how['allow_patterns'] or f.name == WEIGHTS and not revision: continue
            (there/f.name).write_bytes(f.read_bytes())
        return str(there)
    class Request: git_reference = 'refs/pr/13'
    class Api:
        def get_repo_discussions(self, name, author, discussion_type):
            assert (author, discussion_type) == ('SFconvertbot', 'pull_request')
            return [Request()] * converted
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    if converted: assert SentimentModel('some/model', 'cpu', network=True).score(['a']).score.notna().all()
    else: refused('has no model.safetensors', SentimentModel, 'some/model', 'cpu', True)
    assert [revision for _, revision, _ in asked] == [None, 'refs/pr/13'][:1 + converted]
    assert all(set(files) == {'config.json', 'tokenizer.json', 'tokenizer_config.json', 'vocab.txt', WEIGHTS}
               for _, _, files in asked)

def test_what_the_hub_says_is_one_sentence(monkeypatch):
    import huggingface_hub
    def snapshot(*args, **kw): raise OSError('no route to host\nand much more')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
    refused('some/model did not come from the hub: no route to host$', SentimentModel, 'some/model', 'cpu', True)

def test_without_transformers_one_sentence_names_the_extra(folder):
    code = f'''
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] in ('transformers', 'tokenizers', 'huggingface_hub'):
                    raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
        sys.meta_path.insert(0, Block())
        from cryptoml.bert import BertError, SentimentModel
        for how in (({str(folder)!r}, 'cpu', False), ('a/b', 'cpu', True)):
            try: SentimentModel(*how)
            except BertError as e: print(e)
        '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert not done.stderr and done.stdout.count("pip install 'cryptoml[sentiment]'") == done.stdout.count('\n') == 2

def test_importing_loads_no_transformers():
    heavy = {'transformers', 'tokenizers', 'huggingface_hub'}
    code = f'import sys, cryptoml.bert; print(sorted({heavy!r} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'

# ---- files that act (suite 6)

class Bomb:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return (os.mkdir, (str(self.mark),))

def test_no_pickle_is_opened(tmp_path, folder):
    for name in bert.PICKLES + ('training_args.bin', 'optimizer.pt'):
        (folder/name).write_bytes(pickle.dumps(Bomb(tmp_path/'acted')))
    assert SentimentModel(folder, 'cpu').score(['a']).score.notna().all()
    (folder/WEIGHTS).unlink()
    refused('only as pytorch_model.bin, a pickle that can run code, .* convert it where you', read_parts, folder)
    (folder/WEIGHTS).write_bytes(pickle.dumps(Bomb(tmp_path/'acted')))
    refused('is not safetensors', read_parts, folder)
    assert not (tmp_path/'acted').exists()

def changed(folder, **values):
    config = json.loads((folder/'config.json').read_text()) | values
    (folder/'config.json').write_text(json.dumps(config))

def test_no_code_of_a_model_is_run(tmp_path, folder):
    (folder/'evil.py').write_text(f'import os; os.mkdir({str(tmp_path/"acted")!r})')
    changed(folder, auto_map={'AutoModelForSequenceClassification': 'evil.Model', 'AutoConfig': 'evil.Config'})
    refused('asks for code of its own .auto_map.: it is not run', read_parts, folder)
    assert not (tmp_path/'acted').exists()

def test_what_a_config_says_besides_sizes_never_arrives(folder):
    expected = SentimentModel(folder, 'cpu').score(TEXTS)
    changed(folder, quantization_config=dict(quant_method='evil'), attn_implementation='evil', torch_dtype='evil',
            _name_or_path='/etc/passwd', architectures=['os.system'], custom_pipelines=dict(a='b'), is_decoder=True,
            add_cross_attention=True, chunk_size_feed_forward=-1, tokenizer_class='evil.T', output_attentions=True)
    (folder/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path='evil/base', peft_type='LORA')))
    (folder/'chat_template.jinja').write_text('{{ evil }}')
    pd.testing.assert_frame_equal(SentimentModel(folder, 'cpu').score(TEXTS), expected)

@pytest.mark.parametrize('values, words', [
    (dict(model_type='roberta'), "type 'roberta': this page reads 'bert'"),
    (dict(model_type=['bert']), 'of type'),
    (dict(vocab_size=10 ** 12), 'vocab_size must be a whole number'),
    (dict(hidden_size='16'), 'hidden_size must be a whole number'),
    (dict(hidden_size=-16), 'hidden_size must be'),
    (dict(num_hidden_layers=10 ** 6), 'num_hidden_layers must be'),
    (dict(num_hidden_layers=100), 'asks for .* numbers'),
    (dict(num_hidden_layers=3), 'asks for .* numbers'),
    (dict(intermediate_size=65536), 'asks for .* numbers'),
    (dict(hidden_size=8192, num_attention_heads=1), 'asks for .* numbers'),
    (dict(intermediate_size=31), 'weights do not fit config.json'),
    (dict(hidden_act='__import__'), 'hidden_act must be one of'),
    (dict(layer_norm_eps=float('nan')), 'layer_norm_eps must be'),
    (dict(num_attention_heads=5), 'cannot be split among 5 heads'),
    (dict(position_embedding_type='relative_key'), 'only absolute positions'),
    (dict(id2label=None), 'the model has none'),
    (dict(id2label={'0': 'LABEL_0', '1': 'LABEL_1', '2': 'LABEL_2'}), 'the model has LABEL_0, LABEL_1, LABEL_2'),
    (dict(id2label={'0': 'negative', '1': 'positive'}), 'the model has negative, positive'),
    (dict(id2label={'0': 'negative', '1': 'positive', '2': 'positive'}), 'labels must be'),
    (dict(id2label={'0': 'negative', '1': 'neutral', '7': 'positive'}), 'labels must be'),
    (dict(id2label={str(i): str(i) for i in range(10 ** 5)}), 'labels must be'),
    (dict(vocab_size=20), 'words up to .*, the model 20|asks for|do not fit'),
], ids=lambda v: ascii(v)[:30])
def test_a_forged_config(folder, values, words):
    changed(folder, **values)
    before, start = resident(), time.process_time()
    refused(words, read_parts, folder)
    assert resident() - before < 200 << 20 and time.process_time() - start < 20

NONE = ['', '[]', '7', '{', '[' * 10 ** 6, '{"a":' * 10 ** 5, '\0', 'null']

@pytest.mark.parametrize('text', NONE, ids=lambda t: ascii(t)[:8])
def test_a_config_that_is_none(folder, text):
    (folder/'config.json').write_text(text)
    refused('config.json is not', read_parts, folder)

def header(length, text=b'{}', rest=b''): return length.to_bytes(8, 'little') + text + rest

@pytest.mark.parametrize('data', [
    b'', b'1234567', header(1 << 62), header((1 << 64) - 1), header(100_000_000), header(2), header(2, b'[]'),
    header(93, b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4000000000000000000]}}  '),
    header(57, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999999]}} '[:57]),
    header(56, b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,16]}}', b'0' * 16),
], ids=range(10))
def test_weights_that_lie(folder, data):
    (folder/WEIGHTS).write_bytes(data)
    before = resident()
    refused('is not safetensors|has no output|without outputs', read_parts, folder)
    assert resident() - before < 100 << 20

def test_a_name_that_leads_elsewhere(tmp_path, folder):
    "Weights in pieces name files in an index: it is not read; nor does a link out of the folder work"
    (folder/WEIGHTS).rename(tmp_path/'elsewhere')
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={'a': '../elsewhere'})))
    refused('has no model.safetensors', read_parts, folder)
    (folder/WEIGHTS).symlink_to(tmp_path/'elsewhere')
    refused('leads out of its folder', read_parts, folder)
    (folder/WEIGHTS).unlink()
    for target in ('/dev/zero', '/proc/self/mem'):
        (folder/WEIGHTS).symlink_to(target)
        refused('leads out of its folder', read_parts, folder)
        (folder/WEIGHTS).unlink()
    (folder/WEIGHTS).symlink_to(WEIGHTS)                                    # to itself
    refused('cannot be read', read_parts, folder)
    (folder/WEIGHTS).unlink()
    os.mkfifo(folder/WEIGHTS)
    refused('is not a regular file', read_parts, folder)

def test_gigabytes_of_nothing_are_not_read(folder):
    with open(folder/'config.json', 'r+b') as f: f.truncate(1 << 40)        # sparse
    before = resident()
    refused('has 1,099,511,627,776 bytes, at most', read_parts, folder)
    assert resident() - before < 50 << 20

# ---- damage (suite 5)

def test_weights_cut_off_anywhere(folder):
    whole = (folder/WEIGHTS).read_bytes()
    for n in [*range(0, len(whole), len(whole) // 25), len(whole) - 1]:
        (folder/WEIGHTS).write_bytes(whole[:n])
        refused('is not safetensors', read_parts, folder)

def test_numbers_that_are_not_finite(folder):
    tensors = safetensors.torch.load_file(folder/WEIGHTS)
    tensors['bert.encoder.layer.1.output.dense.weight'][3, 4] = torch.nan
    safetensors.torch.save_file(tensors, folder/WEIGHTS)
    refused('1 tensors have numbers that are not finite, first bert.encoder.layer.1.output', read_parts, folder)

@pytest.mark.parametrize('lost', ['classifier.bias', 'bert.pooler.dense.weight', 'bert.embeddings.LayerNorm.weight'])
def test_a_tensor_is_missing(folder, lost):
    "transformers would draw it at random and warn"
    tensors = safetensors.torch.load_file(folder/WEIGHTS)
    del tensors[lost]
    tensors['padding'] = torch.zeros(1000)
    safetensors.torch.save_file(tensors, folder/WEIGHTS)
    refused(f'1 tensors are missing from model.safetensors, first {lost}', read_parts, folder)

def test_an_encoder_without_outputs(folder):
    tensors = {k: v for k, v in safetensors.torch.load_file(folder/WEIGHTS).items() if 'classifier' not in k}
    safetensors.torch.save_file(tensors, folder/WEIGHTS)
    refused('an encoder without outputs for labels: fine-tune it first', read_parts, folder)

@pytest.mark.parametrize('name, text, words', [
    ('vocab.txt', None, 'neither tokenizer.json nor vocab.txt'),
    ('vocab.txt', '', 'does not write .CLS. and .SEP.|tokenizer is damaged|no vocabulary'),
    ('vocab.txt', 'just\nwords', 'does not write .CLS.|no vocabulary|damaged'),
    ('tokenizer.json', '{', 'the tokenizer is damaged'),
    ('tokenizer.json', '{}', 'the tokenizer is damaged'),
    ('tokenizer.json', '[' * 10 ** 5, 'the tokenizer is damaged'),
    ('tokenizer_config.json', '7', 'is not an object but int'),
    ('config.json', None, 'has no config.json'),
    (WEIGHTS, None, 'has no model.safetensors'),
], ids=lambda v: ascii(v)[:20])
def test_a_file_is_missing_or_another(folder, name, text, words):
    if text is None: (folder/name).unlink()
    else: (folder/name).write_text(text)
    refused(words, read_parts, folder)

def test_a_tokenizer_changed_anywhere_is_refused_or_reads(folder):
    "Its library is Rust, and may panic, which is no Exception in Python"
    from transformers import BertTokenizer
    BertTokenizer(vocab=str(folder/'vocab.txt')).save_pretrained(folder)
    whole = (folder/'tokenizer.json').read_bytes()
    rng, read = random.Random(0), 0
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 5])): data[rng.randrange(len(data))] = rng.choice(b'{}[]":,0123abcdefgz')
        (folder/'tokenizer.json').write_bytes(data)
        try: SentimentModel(folder, 'cpu').score(['price rises', HOSTILE['emoji']])
        except BertError as e: assert '\n' not in str(e)
        else: read += 1
    assert 0 < read < 250

def test_a_vocabulary_of_other_bytes(folder):
    (folder/'vocab.txt').write_bytes(b'[PAD]\n\xff\xfe\n')
    refused('no vocabulary', read_parts, folder)

def test_a_flipped_bit_of_our_own_is_found(tmp_path, parts):
    save_parts(parts, tmp_path/'ours')
    generation = next((tmp_path/'ours').glob('gen-*'))
    rng = random.Random(0)
    for file in sorted(generation.iterdir()):
        whole = file.read_bytes()
        for _ in range(12):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            refused('no whole generation', load_parts, tmp_path/'ours')
            file.write_bytes(whole[:rng.randrange(len(whole))])
            refused('no whole generation', load_parts, tmp_path/'ours')
        file.write_bytes(whole)
    assert load_parts(tmp_path/'ours').digest == parts.digest

def forged(root, parts, content=None, **tensors):
    "A generation whose digests are right and whose content is not"
    from cryptoml.state import save
    words = torch.frombuffer(bytearray(parts.tokenizer.encode()), dtype=torch.uint8)
    whole = dict(network=parts.network.state_dict(), tokenizer=dict(text=words))
    about = dict(bert=dict(sizes=parts.sizes, pooling='first', labels=list(LABELS)) | (content or {}))
    save(root, whole | tensors, about)

@pytest.mark.parametrize('content, tensors, words', [
    (dict(pooling='evil'), {}, "pooling 'evil' is not known"),
    (dict(pooling=None), {}, 'is not known'),
    (dict(pooling='mean'), dict(network={}), 'no whole model|asks for'),
    (dict(labels=['positive', 'neutral', 'negative']), {}, 'is no model that scores texts'),
    (dict(sizes=7), {}, 'no whole model'),
    (dict(sizes=dict(hidden_size=10 ** 9)), {}, 'hidden_size must be'),
    ({}, dict(tokenizer=dict(text=torch.zeros(5))), 'no whole model|damaged'),
    ({}, dict(tokenizer={}), 'no whole model'),
    ({}, dict(network=dict(a=torch.zeros(2))), 'no whole model|asks for'),
], ids=range(9))
def test_a_forged_generation(tmp_path, parts, content, tensors, words):
    forged(tmp_path/'ours', parts, content, **tensors)
    refused(words, read_parts, tmp_path/'ours')

def test_a_generation_of_another_page(tmp_path):
    from cryptoml.state import save
    save(tmp_path/'ours', dict(model=dict(a=torch.zeros(2))), dict(epochs=3))
    refused('is no model that scores texts', read_parts, tmp_path/'ours')
    (tmp_path/'empty').mkdir()
    refused('has no config.json', read_parts, tmp_path/'empty')

@pytest.mark.parametrize('pooling', ['first', 'mean'])
def test_what_is_saved_scores_the_same(tmp_path, parts, pooling):
    encoder = copy.deepcopy(parts.network.encoder)
    if pooling == 'mean': encoder.pooler = None
    network = Network(encoder, pooling)
    network.head.load_state_dict(parts.network.head.state_dict())
    made = Parts(network.eval(), parts.sizes, parts.tokenizer)
    save_parts(made, tmp_path/'ours')
    again = SentimentModel(tmp_path/'ours', 'cpu')
    assert again.digest == made.digest
    np.testing.assert_array_equal(again.score(TEXTS)[list(LABELS)], Reader(made, 'cpu')(readable(TEXTS)))

def test_the_mean_is_over_pieces_and_not_over_padding(parts):
    network = Network(parts.network.encoder, 'mean').eval()
    read = Reader(Parts(network, parts.sizes, parts.tokenizer), 'cpu')
    alone = read(['a'])
    np.testing.assert_allclose(read(['a', 'falls ' * 40])[0], alone[0], atol=1e-6)
    ids = torch.tensor([read.tokenizer.encode('a').ids])
    with torch.no_grad(): plain = network.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    with torch.no_grad(): p = network.head(plain.mean(1)).softmax(-1)
    np.testing.assert_allclose(alone, p, atol=1e-6)

# ---- what strangers write

HOSTILE = {
    'a megabyte': 'price ' * 170_000, 'one word of a megabyte': 'a' * 10 ** 6, 'spaces': ' ' * 10 ** 6 + 'price',
    'right to left': '\u202eprice falls\u202c \u05d0\u05d1', 'nul': 'price\0 falls', 'control': '\x01\x02price\x7f',
    'surrogates': 'price \ud800 falls \udfff', 'emoji': '\U0001f680' * 9000 + ' price',
    'combining': 'p' + '\u0301' * 9000, 'marks of the model': '[CLS] [SEP] [MASK] [PAD] price',
    'html': '<script>price</script>', 'lines': 'price\r\n\u2028falls',
    'sql': "'); DROP TABLE scores; -- price",
}

@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_text_is_scored_in_bounded_time(tmp_path, parts, name):
    read = Reader(parts, 'cpu')
    start = time.process_time()
    texts = readable([HOSTILE[name]])
    assert len(texts[0]) <= LETTERS and len(read.pieces(texts)[0]) <= TOKENS
    p = read(texts)
    assert time.process_time() - start < 5
    if name == 'one word of a megabyte': assert np.isnan(p).all()            # no piece of it is known
    else: np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)

NOTHING = ['', ' \t\n', None, float('nan'), pd.NA, pd.NaT, '\U0001f680' * 9000, '\0', '\u200b', '比特币']

@pytest.mark.parametrize('text', NOTHING, ids=lambda t: ascii(t)[:12])
def test_nothing_to_read_is_nan_and_never_zero(folder, text):
    found = SentimentModel(folder, 'cpu').score(['a', text, 'price'])
    assert found.iloc[1].isna().all() and found.iloc[[0, 2]].notna().all().all()

@pytest.mark.parametrize('texts, words', [
    ('one text', 'got one: write'), (b'bytes', 'got one'), ([1], '1 of 1 texts are no strings, first at 0: int'),
    (['a', b'b', 2.5], '2 of 3 texts are no strings, first at 1: bytes'), ([['a']], 'first at 0: list'), ([{}], 'dict'),
])
def test_what_is_no_text_is_refused(texts, words): refused(words, readable, texts)

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=60) | st.sampled_from(TEXTS) | st.none(), max_size=9), st.randoms())
def test_any_text_in_any_company(parts, texts, chance):
    read = Reader(parts, 'cpu')
    p = read(readable(texts))
    told = ~np.isnan(p).any(1)
    np.testing.assert_allclose(p[told].sum(1), 1, atol=1e-5)
    assert np.isnan(p[~told]).all()
    order = list(range(len(texts)))
    chance.shuffle(order)
    np.testing.assert_allclose(read(readable([texts[i] for i in order])), p[order], atol=2e-6)

def test_a_text_is_computed_once(parts, folder, monkeypatch):
    model = SentimentModel(folder, 'cpu')
    seen = []
    read = model.read
    model.read = lambda texts: seen.extend(texts) or read(texts)
    found = model.score(['price', 'a', 'price', ' price ', 'a'])
    assert sorted(seen) == ['a', 'price'] and found.score.nunique() == 2
    assert found.score[0] == found.score[2] == found.score[3]

# ---- the store

def keys_of(n, model='m'): return [score_key(model, f'headline {i}') for i in range(n)]

def value_of(key): return np.frombuffer(key[:12], '<u4').astype('f4')      # of a key, so that a wrong one is seen

def filled(path, n=2000, **kw):
    store = ScoreStore(path, **kw)
    store.write({k: value_of(k) for k in keys_of(n)})
    return store

def right(found): return all(np.array_equal(p, value_of(k)) for k, p in found.items())

def test_ten_thousand_scores_are_read_fast_enough(tmp_path):
    store = filled(tmp_path/'scores', 10_000)
    start = time.process_time()
    found = store.read(keys_of(10_000))
    rate = 10_000 / (time.process_time() - start)
    assert len(found) == 10_000 and right(found) and rate > 20_000

def test_scores_are_remembered_by_text_and_model(tmp_path, folder):
    store = ScoreStore(tmp_path/'scores')
    first = SentimentModel(folder, 'cpu', store=store).score(TEXTS)
    again = SentimentModel(folder, 'cpu', store=store)
    again.read = None
    pd.testing.assert_frame_equal(again.score(TEXTS), first)
    tiny(tmp_path/'other', seed=1)
    other = SentimentModel(tmp_path/'other', 'cpu', store=store).score(TEXTS)
    assert (other.score - first.score).abs().max() > .01
    assert b'Bitcoin' not in b''.join(p.read_bytes() for p in store.files() if p.exists())

def test_a_store_is_bounded(tmp_path):
    store = ScoreStore(tmp_path/'scores', rows=500)
    keys = keys_of(40_000)
    sizes = []
    for i in range(0, len(keys), 1000):
        store.write({k: value_of(k) for k in keys[i:i + 1000]})
        sizes.append(sum(p.stat().st_size for p in store.files() if p.exists()))
    found = store.read(keys)
    assert set(found) == set(keys[-500:]) and right(found)
    assert max(sizes[20:]) <= 1.2 * max(sizes[:20])

def test_damage_costs_a_scoring_and_never_a_wrong_score(tmp_path, monkeypatch):
    monkeypatch.setattr(bert.log, 'warning', lambda *a: None)
    store = filled(tmp_path/'scores')
    with store.opened() as db: db.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()
    whole = store.path.read_bytes()
    rng, lost = random.Random(0), 0
    for turn in range(60):
        data = bytearray(whole)
        if turn % 3 == 0: data = data[:rng.randrange(len(data))]
        else:
            for _ in range(rng.choice([1, 9, 200])): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        for p in store.files(): p.unlink(missing_ok=True)
        store.path.write_bytes(data)
        found = store.read(keys_of(2000))
        lost += len(found) < 2000
        assert right(found)
        store.write({k: value_of(k) for k in keys_of(5)})
        assert set(keys_of(5)) <= set(store.read(keys_of(5)))               # and it goes on
    assert lost > 20

OTHER = [b'', b'no database', b'SQLite format 3\0' + b'\xff' * 5000, random.Random(0).randbytes(4096)]

@pytest.mark.parametrize('content', OTHER, ids=range(4))
def test_another_file_in_its_place(tmp_path, content):
    (tmp_path/'scores').write_bytes(content)
    store = filled(tmp_path/'scores', 10)
    assert len(store.read(keys_of(10))) == 10

def test_a_foreign_table_is_not_obeyed(tmp_path):
    "A trigger, or a view in the table's place, would be a program"
    with sqlite3.connect(tmp_path/'scores') as db:
        db.execute(bert._TABLE)
        db.execute("CREATE TRIGGER t AFTER INSERT ON scores BEGIN UPDATE scores SET value = x'00'; END")
    store = filled(tmp_path/'scores', 10)
    assert right(store.read(keys_of(10))) and len(store.read(keys_of(10))) == 10

def test_no_place_to_write_is_said_once_and_scoring_goes_on(tmp_path, folder, caplog):
    (tmp_path/'file').write_text('no folder')
    (tmp_path/'link').symlink_to(tmp_path/'elsewhere')
    (tmp_path/'folder'/'scores').mkdir(parents=True)
    expected = SentimentModel(folder, 'cpu').score(TEXTS)
    for path in (tmp_path/'file'/'scores', tmp_path/'link', tmp_path/'folder'/'scores'):
        model = SentimentModel(folder, 'cpu', store=ScoreStore(path))
        pd.testing.assert_frame_equal(model.score(TEXTS), expected)
        pd.testing.assert_frame_equal(model.score(TEXTS), expected)
    assert caplog.text.count('scores are not remembered in') == 3
    assert not (tmp_path/'elsewhere').exists()

def test_a_full_disk(tmp_path, folder):
    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        store = ScoreStore(tmp_path/'scores')
        for i in range(10):
            store.write({k: value_of(k) for k in keys_of(1000 * (i + 1))})
        assert store.warned and right(store.read(keys_of(10_000)))
        assert len(SentimentModel(folder, 'cpu', store=store).score(TEXTS)) == len(TEXTS)
    assert ended(forked(fill)) == 0
    store = filled(tmp_path/'scores', 3000)                                  # the disk has room again
    assert len(store.read(keys_of(3000))) == 3000

def test_a_store_that_cannot_be_written_can_be_read(tmp_path, monkeypatch):
    store = filled(tmp_path/'scores', 100)
    real = sqlite3.connect
    def locked(*args, **kw):
        db = real(*args, **kw)
        db.execute('PRAGMA query_only=ON')
        return db
    monkeypatch.setattr(sqlite3, 'connect', locked)
    store.write({k: value_of(k) for k in keys_of(200)})
    assert store.warned and len(store.read(keys_of(200))) == 100

def test_killed_at_any_moment(tmp_path):
    "What was written stays, what is there is right, nothing has to be mended"
    rng, path = random.Random(0), tmp_path/'scores'
    kills = int(os.environ.get('CRYPTOML_KILLS', 20))
    most = 0
    for turn in range(kills):
        start = turn * 5000
        def go_on():
            store = ScoreStore(path)
            for i in range(start, start + 5000, 50):
                store.write({k: value_of(k) for k in keys_of(i + 50)[i:]})
        pid = forked(go_on)
        time.sleep(rng.uniform(.01, .12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        store = ScoreStore(path)
        found = store.read(keys_of(start + 5000))
        assert right(found) and not store.warned and len(found) >= most
        most = len(found)
    assert most > 50

def test_several_processes_at_once(tmp_path):
    path = tmp_path/'scores'
    def work(own):
        def go():
            store = ScoreStore(path)
            for i in range(0, 1000, 100):
                store.write({k: value_of(k) for k in keys_of(1000, own)[i:i + 100]})
                assert right(store.read(keys_of(1000, own))) and not store.warned
        return forked(go)
    assert [ended(pid) for pid in [work(str(i)) for i in range(4)]] == [0] * 4
    store = ScoreStore(path)
    assert all(len(store.read(keys_of(1000, str(i)))) == 1000 for i in range(4))

def test_processes_that_find_it_damaged_at_once(tmp_path):
    path = tmp_path/'scores'
    path.write_bytes(b'damaged' * 1000)
    def go():
        store = ScoreStore(path)
        for _ in range(20):
            store.write({k: value_of(k) for k in keys_of(50)})
            assert right(store.read(keys_of(50)))
    assert [ended(pid) for pid in [forked(go) for _ in range(4)]] == [0] * 4
    filled(path, 50)
    assert len(ScoreStore(path).read(keys_of(50))) == 50

def test_rows_must_be_a_number(tmp_path):
    from cryptoml.settings import SettingError
    with pytest.raises(SettingError, match='rows must be a whole number from 1'): ScoreStore(tmp_path/'scores', rows=0)

# ---- news

def test_news_become_scores(folder):
    model = SentimentModel(folder, 'cpu')
    news = pd.DataFrame(dict(
        timestamp=['2024-03-31 01:30', '2024-03-31T03:00+02:00', '2024-04-01'],
        known=[1711850400, 1711854000, 1711929600],
        title=['price rises', 'hack', ''],
        text=[None, 'falls', None],
        symbol=['BTC/USDT', 'BTC/USDT', None]), index=[5, 5, 7])
    found = score_news(news, model)
    assert list(found) == ['time', 'known', 'symbol', 'score'] and len(found) == 2
    assert str(found.time.dtype) == 'datetime64[us, UTC]'
    assert found.time[1] == pd.Timestamp('2024-03-31 01:00', tz='UTC')
    np.testing.assert_allclose(found.score, model.score(['price rises', 'hack. falls']).score, atol=1e-6)
    assert found.score.between(-1, 1).all()

@pytest.mark.parametrize('news, words', [
    (pd.DataFrame(dict(time=['2024-01-01'], score=[1.])), 'needs time .* and title or text, it has time, score'),
    (pd.DataFrame(dict(title=['a'])), 'needs time'), ([1], 'must be a frame, got list'),
    (pd.DataFrame(dict(time=['2024-01-01'], title=[7])), '1 of 1 texts are no strings'),
], ids=range(4))
def test_news_that_cannot_be_scored(folder, news, words):
    refused(words, score_news, news, SentimentModel(folder, 'cpu'))

def test_times_that_cannot_be_read_are_named(folder):
    from cryptoml.data import DataError
    with pytest.raises(DataError, match='time: 1 of 2 times cannot be read'):
        score_news(pd.DataFrame(dict(time=['2024-01-01', 'tomorrow'], title=['a', 'b'])), SentimentModel(folder, 'cpu'))

# ---- the same twice, and no more memory

def test_two_processes_score_the_same_bits(folder):
    code = f'''
        import torch
        torch.set_num_threads(1)
        from cryptoml.bert import SentimentModel
        model = SentimentModel({str(folder)!r}, 'cpu')
        print(model.digest, model.score({TEXTS!r}).to_numpy().tobytes().hex())
        '''
    run = [sys.executable, '-c', textwrap.dedent(code)]
    one, two = (subprocess.run(run, capture_output=True, text=True).stdout for _ in range(2))
    assert len(one) > 64 and one == two

def test_loading_leaves_the_process_as_it_was(folder):
    import transformers
    level = transformers.logging.get_verbosity()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    read_parts(folder)
    assert torch.equal(torch.rand(3), expected) and transformers.logging.get_verbosity() == level

def test_memory_does_not_grow(tmp_path, folder):
    model = SentimentModel(folder, 'cpu', store=ScoreStore(tmp_path/'scores', rows=2000))
    total = int(os.environ.get('CRYPTOML_SLOPES', 2000))
    def work(n, start):
        for i in range(start, start + n, 10):
            model.score([f'price {j} rises {"a " * (j % 40)}' for j in range(i, i + 10)])
    work(1000, 0)
    before, files = resident(), len(os.listdir('/proc/self/fd'))
    work(total, 1000)
    assert resident() - before < (1 << 20) * max(4, total / 1000) and len(os.listdir('/proc/self/fd')) == files
