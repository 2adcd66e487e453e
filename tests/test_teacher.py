"""Distillation: the loss against numpy, runs with a teacher resumed, teachers that do not fit; --quantize."""
import functools
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import MNIST_SCRIPTS, QUICK, assert_same, chosen, load_script, start, variables
from test_faults import in_epoch

from twta import TwtaError, UsageError, results
from twta.data import datasets
from twta.graph.tf1 import tf
from twta.training import teacher as teacher_module
from twta.training import weights
from twta.training.blocks import read_blocks
from twta.training.build import build_graph
from twta.training.records import without_places

FLAGS = QUICK[2:]


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """The directory of a run of two epochs with --quantize nothing; tests must not change it."""
    run_dir = tmp_path_factory.mktemp('teacher')
    start(run_dir, *FLAGS, '--epochs', 2, '--quantize', 'nothing')
    return run_dir


def taught(run_dir, teacher, *flags):
    start(run_dir, *FLAGS, '--epochs', 3, '--teacher', teacher / 'model.npz', *flags)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def test_the_loss_is_that_of_the_paper(session):
    rng = np.random.default_rng(0)
    student, of_teacher = rng.standard_normal((2, 7, 10)).astype(np.float32) * 3
    found = session.run(teacher_module.distilled(tf.constant(1.5), tf.constant(student), tf.constant(of_teacher)))
    share, temperature = teacher_module.SHARE, teacher_module.TEMPERATURE
    soft = -(softmax(of_teacher / temperature) * np.log(softmax(student / temperature))).sum(1).mean()
    np.testing.assert_allclose(found, (1 - share) * 1.5 + share * temperature ** 2 * soft, rtol=1e-5)


def test_hints_are_cosines_between_maps(session):
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 5, 3, 3, 4)) + np.reshape([2, -1], [2, 1, 1, 1, 1])
    a, b = ((values - values.mean()).reshape(5, -1) for values in (x, target))
    length = np.linalg.norm(a, axis=1, keepdims=True) * np.linalg.norm(b, axis=1, keepdims=True)
    cosine = (a * b).sum(1, keepdims=True) / length
    x = tf.constant(x, tf.float32)
    loss = teacher_module.unlikeness(x, tf.constant(target, tf.float32))
    found, gradient = session.run([loss, tf.gradients(3 * loss, x)[0]])
    np.testing.assert_allclose(found, (1 - cosine).mean(), rtol=1e-5)
    expected = -3 / 5 * (b / length - cosine * a / (a * a).sum(1, keepdims=True))
    np.testing.assert_allclose(gradient.reshape(5, -1), expected - expected.mean(), atol=1e-6)


def test_a_network_of_maps_without_variation_has_a_loss(session):
    """A hint of a map in which all values are equal has no direction."""
    flat = tf.zeros([2, 3])
    loss = teacher_module.unlikeness(flat, flat)
    found, gradient = session.run([loss, tf.gradients(loss, flat)[0]])
    assert found == 1 and not gradient.any()


def test_a_resumed_run_keeps_its_teacher(teacher, tmp_path, monkeypatch, capsys):
    """Stop in the second epoch, go on without --teacher: the bits of a run that never stopped; without one, others."""
    taught(tmp_path / 'whole', teacher)
    with monkeypatch.context() as context, pytest.raises(SystemExit):
        in_epoch(context, 2, lambda: signal.raise_signal(signal.SIGTERM))
        taught(tmp_path / 'stopped', teacher)
    start(tmp_path / 'stopped', '--resume', 'True')
    assert f'teacher: {teacher / "model.npz"}' in capsys.readouterr().out
    whole = variables(tmp_path / 'whole')
    assert_same(variables(tmp_path / 'stopped'), whole)
    assert not [name for name in whole if name.startswith('teacher')]
    start(tmp_path / 'alone', *FLAGS, '--epochs', 3)
    alone = variables(tmp_path / 'alone')
    assert any((alone[name] != value).any() for name, value in whole.items() if name.endswith('/W'))
    record = json.loads((tmp_path / 'whole' / 'record.json').read_text())
    assert record['name'].endswith('-taught') and len(record['flags']['teacher']) == 64
    assert without_places(record) == record  # as twta.report --add takes it in


@pytest.mark.parametrize('rest', [0, -1])
def test_a_training_begins_with_weights_in_full_precision(teacher, tmp_path, rest):
    """At the smallest rate nearly nothing moves: the first epoch ends with the parameters of the twin, beta lowered."""
    flags = '--weights', teacher / 'model.npz', '--rest', rest
    start(tmp_path, *FLAGS, '--epochs', 1, *flags, '--learning_rate', 1e-12)
    begun, twin = (dict(np.load(run_dir / 'model.npz')) for run_dir in (tmp_path, teacher))
    for name, value in twin.items():
        if 'moving' not in name:
            lowered = rest if name.endswith('beta:0') and not name.startswith('classify') else 0
            np.testing.assert_allclose(begun[name], value + lowered, rtol=0, atol=1e-6, err_msg=name)
    assert json.loads((tmp_path / 'record.json').read_text())['name'].endswith('-begun-rest_-1' if rest else '-begun')
    with pytest.raises(UsageError, match=r'weights in .* were trained with --(quantize nothing|rest 0); give that'):
        start(tmp_path, *flags, '--mode', 'inference')
    with pytest.raises(UsageError, match=r'--pooling max: the weights in .* were trained with --pooling conv'):
        start(tmp_path, *FLAGS, *flags[:2], '--pooling', 'max')


def test_beta_init_lowers_the_betas_of_a_twin(tmp_path, capsys):
    script, twin = 'TWBA_5_5_MNIST', tmp_path / 'twin'
    start(twin, *FLAGS, '--epochs', 1, '--quantize', 'nothing', script=script)
    flags = *FLAGS, '--epochs', 1, '--learning_rate', 1e-12, '--beta_init', -0.5
    start(tmp_path / 'run', *flags, '--weights', twin / 'model.npz', script=script)
    begun, before = (dict(np.load(run_dir / 'model.npz')) for run_dir in (tmp_path / 'run', twin))
    for name, value in before.items():
        if 'moving' not in name:
            lowered = -0.5 if name.endswith('beta:0') and not name.startswith('classify') else 0
            np.testing.assert_allclose(begun[name], value + lowered, rtol=0, atol=1e-6, err_msg=name)
    record = json.loads((tmp_path / 'run' / 'record.json').read_text())
    assert record['name'].endswith('-begun-beta_init_-0.5') and record['choices']['beta_init'] == -0.5
    start(tmp_path / 'run', *FLAGS, '--epochs', 1, '--resume', 'True', script=script)
    assert 'beta_init -0.5' in capsys.readouterr().out

    alone = tmp_path / 'alone.npz'  # nothing tells that it is of a twin
    shutil.copy(twin / 'model.npz', alone)
    start(tmp_path / 'alone', *flags, '--weights', alone, script=script)
    assert f'WARNING: --weights {alone}: no config.json beside it' in capsys.readouterr().out
    np.testing.assert_allclose(np.load(tmp_path / 'alone' / 'model.npz')['conv1/bn/beta:0'], before['conv1/bn/beta:0'],
                               rtol=0, atol=1e-6)

    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    del config['flags']['choices']['beta_init']  # of a run before the option was there
    results.write_json(tmp_path / 'run' / 'config.json', config)
    with pytest.raises(UsageError, match=r'were trained with --beta_init 0; give that'):
        start(tmp_path / 'again', *flags, '--weights', tmp_path / 'run' / 'model.npz', script=script)


def test_a_threshold_that_the_twin_lacks_begins_at_its_value(teacher, finished_run, tmp_path):
    start(tmp_path, *FLAGS, '--epochs', 1, '--learning_rate', 1e-12, '--threshold', 'trainable', '--weights',
          teacher / 'model.npz')
    d = variables(tmp_path)['conv1/activation/d']
    np.testing.assert_allclose(d, 0.5, rtol=0, atol=1e-6)
    shutil.copy(finished_run / 'model.npz', tmp_path / 'others.npz')
    (tmp_path / 'config.json').unlink()  # nothing tells that these are of a twin
    with pytest.raises(TwtaError, match=r'is of another network: conv1/activation/d:0 is absent there'):
        start(tmp_path / 'a', *FLAGS, '--threshold', 'trainable', '--weights', tmp_path / 'others.npz')


def test_a_script_without_ternary_layers_begins_with_the_same_weights(teacher, tmp_path):
    start(tmp_path, *FLAGS, '--epochs', 1, '--learning_rate', 1e-12, '--weights', teacher / 'model.npz',
          script='FP_5_5_MNIST')
    begun, twin = (dict(np.load(run_dir / 'model.npz')) for run_dir in (tmp_path, teacher))
    for name in twin:
        if 'moving' not in name:
            np.testing.assert_allclose(begun[name], twin[name], rtol=0, atol=1e-6, err_msg=name)


def test_weights_of_an_fp_script_are_in_full_precision(tmp_path):
    """A ternary training begins with them as with --quantize nothing, and learns from them; it is not evaluated so."""
    start(tmp_path / 'fp', *FLAGS, '--epochs', 1, script='FP_5_5_MNIST')
    fp = '--weights', tmp_path / 'fp' / 'model.npz'
    start(tmp_path / 'run', *FLAGS, '--epochs', 1, '--learning_rate', 1e-12, '--rest', -1, *fp, '--teacher', fp[1])
    begun, twin = (dict(np.load(tmp_path / name / 'model.npz')) for name in ('run', 'fp'))
    np.testing.assert_allclose(begun['conv3/bn/beta:0'], twin['conv3/bn/beta:0'] - 1, rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match=r'were trained with --quantize nothing; give that'):
        start(tmp_path / 'run', '--mode', 'inference', *fp)
    start(tmp_path / 'run', '--mode', 'inference', *fp, '--quantize', 'nothing')
    with pytest.raises(UsageError, match=r'of a network in full precision, which cannot be packed'):
        start(tmp_path / 'run', '--mode', 'export', '--file', tmp_path / 'net.twta', *fp)


def test_weights_of_another_script_are_not_evaluated(finished_run, tmp_path):
    flags = '--weights', finished_run / 'model.npz'
    for mode in ('--mode', 'inference'), ('--mode', 'export', '--file', tmp_path / 'net.twta'):
        with pytest.raises(UsageError, match=r'trained by TWTA_5_5_MNIST; use that script'):
            start(tmp_path / 'a', *flags, *mode, script='TWBA_5_5_MNIST')
    start(tmp_path / 'a', *FLAGS, '--epochs', 1, *flags, script='TWBA_5_5_MNIST')  # a training may begin with them
    shutil.copy(finished_run / 'model.npz', tmp_path)
    results.write_json(tmp_path / 'config.json', {'flags': {'choices': {}, 'dataset': 'mnist'}})
    for mode in ('--mode', 'inference'), ('--mode', 'export', '--file', tmp_path / 'net.twta'):
        with pytest.raises(UsageError, match=r'trained on --dataset mnist; give that'):
            start(tmp_path / 'a', '--weights', tmp_path / 'model.npz', *mode)
    results.write_json(tmp_path / 'config.json', {'script': ['TWTA_5_5_MNIST']})  # tells nothing
    start(tmp_path / 'a', '--mode', 'inference', '--weights', tmp_path / 'model.npz', script='TWBA_5_5_MNIST')


def test_weights_that_have_seen_the_images_held_out(tmp_path, capsys):
    digits, none = datasets.load('digits', '', 297), datasets.load('digits', '', 0)
    path = tmp_path / 'model.npz'
    for before, dataset, is_warned in (0, digits, True), (297, digits, False), (None, digits, False), (0, none, False):
        results.write_json(tmp_path / 'config.json', {'data': {'name': digits.name, 'validation_images': before}})
        weights.warn_of_validation({'--weights': path, '--teacher': None}, dataset)
        assert ('--validation 0, this run holds out 297 images' in capsys.readouterr().out) == is_warned
    for data in 3, {'name': 'mnist', 'validation_images': 0}:  # not a dict; of other images
        results.write_json(tmp_path / 'config.json', {'data': data})
        weights.warn_of_validation({'--weights': None, '--teacher': path}, digits)
        assert not capsys.readouterr().out


SHALLOW = '''
from twta.ternary_layers import Network

DATASETS, LEARNING_RATE, EPOCHS, BATCH_SIZE, OPTIONS = ('mnist', 'digits'), 0.001, 1, 100, ('quantize',)


def model(x, is_train, quantize, exact=None):
    net = Network(x, is_train, quantize=quantize, exact=exact)
    net.encode(4, 3)
    return net.classify(10)
'''


def test_a_network_without_layers_between_encoder_and_classifier(tmp_path, capsys):
    """It has no hints, and nothing to tell of quantised weights."""
    script = tmp_path / 'shallow.py'
    script.write_text(SHALLOW)
    start(tmp_path / 'twin', '--quantize', 'nothing', script=script)
    start(tmp_path / 'run', '--teacher', tmp_path / 'twin' / 'model.npz', script=script)
    start(tmp_path / 'run', '--mode', 'export', '--file', tmp_path / 'net.twta', script=script)
    said = capsys.readouterr().out
    assert 'the same predictions as the graph' in said and 'quantised layers' not in said


def test_teachers_that_do_not_fit(teacher, finished_run, tmp_path):
    with pytest.raises(UsageError, match=r'trained with --quantize both; give the model\.npz in the run directory'):
        taught(tmp_path / 'a', finished_run)
    with pytest.raises(UsageError, match=r'--teacher .*: no such file; a training with --quantize nothing writes'):
        taught(tmp_path / 'a', tmp_path)
    with pytest.raises(TwtaError, match=r'--teacher .* is of another network: teacher/'):
        start(tmp_path / 'a', *FLAGS, '--teacher', teacher / 'model.npz', script='TWTA_4_4_MNIST')
    with pytest.raises(UsageError, match='for scripts that have --quantize'):
        start(tmp_path / 'a', *FLAGS, '--teacher', teacher / 'model.npz', script='FP_5_5_MNIST')
    with pytest.raises(UsageError, match='no meaning with --mode inference'):
        start(finished_run, '--mode', 'inference', '--teacher', teacher / 'model.npz')
    with pytest.raises(UsageError, match=r'this training writes its own model\.npz there; choose another --run_dir'):
        taught(shutil.copytree(teacher, tmp_path / 'twin'), tmp_path / 'twin')
    with pytest.raises(UsageError, match='was started without a teacher'):  # it is finished
        start(tmp_path / 'twin', '--resume', 'auto', *FLAGS, '--epochs', 2, '--teacher', teacher / 'model.npz')
    shutil.copy(teacher / 'model.npz', tmp_path)
    config = json.loads((teacher / 'config.json').read_text())
    config['flags']['dataset'] = 'mnist'
    results.write_json(tmp_path / 'config.json', config)
    with pytest.raises(UsageError, match=r'trained on --dataset mnist; give one that was trained on digits'):
        taught(tmp_path / 'a', tmp_path)
    (tmp_path / 'config.json').unlink()
    with pytest.raises(UsageError, match=r'config\.json beside it does not tell that it was trained with'):
        taught(tmp_path / 'a', tmp_path)
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('name, options', [
    ('BWBA_5_5_MNIST', {'pooling': 'average'}), ('TWBA_5_5_MNIST', {'levels': 3}), ('Quant_MNIST', {'k': 2}),
    ('BWBA_CIFAR10_Model2', {'beta_init': -0.5}), ('TWBA_CIFAR10_Model2', {'levels': 3}), ('Quant_CIFAR10', {})])
def test_each_sibling_has_a_twin_in_full_precision(name, options, tmp_path):
    """It has the student's pooling. What config.json tells beyond the student's options, or wrongly, is left out."""
    script = load_script(name)
    options = chosen(script, **options)
    of_twin = {**options, 'quantize': 'nothing', 'threshold': 'fixed', 'levels': 5, 'k': [], 'B': '1' * 5000}
    results.write_json(tmp_path / 'config.json', {'flags': {'choices': of_twin}})
    model = functools.partial(script.model, **options)
    shape, crop = ((28, 28, 1), 0) if name in MNIST_SCRIPTS else ((32, 32, 3), 24)
    network = build_graph(model, shape, crop, 0, tf.float32, taught_by=teacher_module.model_of(tmp_path / 'w', model))
    learners, of_teacher = read_blocks(network.net)[1:-1], read_blocks(network.teacher)[1:-1]
    assert [block.pooling for block in learners] == [block.pooling for block in of_teacher]
    assert all(block.levels for block in learners) and not any(block.levels for block in of_teacher)
    assert not set(network.teacher.all_params) & set(network.graph.get_collection(tf.GraphKeys.TRAINABLE_VARIABLES))


def test_a_sibling_learns_from_its_twin(tmp_path, capsys):
    start(tmp_path / 'twin', *FLAGS, '--epochs', 1, '--quantize', 'nothing', script='Quant_MNIST')
    assert 'network: Quant_MNIST, quantize nothing, 159,824 parameters' in capsys.readouterr().out  # k, B say nothing
    flags = *FLAGS, '--epochs', 1, '--k', 2, '--teacher', tmp_path / 'twin' / 'model.npz'
    start(tmp_path / 'run', *flags, '--weights', tmp_path / 'twin' / 'model.npz', script='Quant_MNIST')
    record = json.loads((tmp_path / 'run' / 'record.json').read_text())
    assert record['name'].endswith('-begun-taught-k_2') and len(record['flags']['teacher']) == 64
    start(tmp_path / 'run', '--mode', 'export', '--file', tmp_path / 'net.twta', script='Quant_MNIST')
    with pytest.raises(TwtaError, match='has full-precision activations: there is nothing to pack'):
        start(tmp_path / 'twin', '--mode', 'export', '--file', tmp_path / 'twin.twta', script='Quant_MNIST')


def test_a_teacher_by_a_relative_path(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher)
    taught(tmp_path / 'run', Path())
    monkeypatch.chdir(tmp_path)
    start(tmp_path / 'run', '--resume', 'True', '--epochs', 1)


def test_a_teacher_behind_a_link(teacher, tmp_path):
    """The config.json beside the link counts, not one beside the file that it leads to."""
    shutil.copytree(teacher, tmp_path / 'twin')
    (tmp_path / 'twin' / 'model.npz').rename(tmp_path / 'elsewhere.npz')
    (tmp_path / 'twin' / 'model.npz').symlink_to(tmp_path / 'elsewhere.npz')
    taught(tmp_path / 'run', tmp_path / 'twin')
    start(tmp_path / 'run', '--resume', 'True', '--epochs', 1)


def test_a_taught_run_that_only_lacks_its_record_needs_no_teacher(teacher, tmp_path, capsys):
    shutil.copytree(teacher, tmp_path / 'twin')
    taught(tmp_path / 'run', tmp_path / 'twin')
    shutil.rmtree(tmp_path / 'twin')
    (tmp_path / 'run' / 'record.json').unlink()
    start(tmp_path / 'run', '--resume', 'True')
    assert 'but have no record' in capsys.readouterr().out
    assert json.loads((tmp_path / 'run' / 'record.json').read_text())['name'].endswith('-taught')


def test_a_teacher_that_is_gone_or_another_one(teacher, finished_run, tmp_path):
    shutil.copytree(teacher, tmp_path / 'teacher')
    taught(tmp_path / 'run', tmp_path / 'teacher')
    (tmp_path / 'teacher' / 'model.npz').write_bytes((finished_run / 'model.npz').read_bytes())
    with pytest.raises(UsageError, match='is another file now, but the run learns from one with the SHA-256'):
        start(tmp_path / 'run', '--resume', 'True', '--epochs', 1)
    (tmp_path / 'teacher' / 'model.npz').unlink()
    with pytest.raises(UsageError, match=r'model\.npz: no such file, but the run learns'):
        start(tmp_path / 'run', '--resume', 'True', '--epochs', 1)
    with pytest.raises(UsageError, match='is another file, but the run learns'):
        start(tmp_path / 'run', '--resume', 'True', '--epochs', 1, '--teacher', finished_run / 'model.npz')
    start(tmp_path / 'run', '--resume', 'True', '--epochs', 1, '--teacher', teacher / 'model.npz')  # the same
    shutil.copytree(finished_run, tmp_path / 'without')
    with pytest.raises(UsageError, match='was started without a teacher'):
        start(tmp_path / 'without', '--resume', 'True', '--epochs', 1, '--teacher', teacher / 'model.npz')


@pytest.mark.parametrize('quantize, ternary, levels', [('both', True, (-1, 0, 1)), ('weights', True, ()),
                                                       ('activations', False, (-1, 0, 1)), ('nothing', False, ())])
def test_what_is_quantised(session, quantize, ternary, levels):
    net = load_script('TWTA_5_5_MNIST').model(tf.zeros([2, 28, 28, 1]), False, quantize=quantize)
    session.run(tf.global_variables_initializer())
    for block in read_blocks(net)[1:-1]:
        assert np.isin(session.run(block.layer.quantized), (-1, 0, 1)).all() == ternary
        assert block.levels == levels


@pytest.mark.parametrize('flags, words', [
    (('--quantize', 'weights', '--mode', 'export'), 'such a network cannot be packed'),
    (('--quantize', 'nothing', '--rest', -1), '--rest -1 has no meaning with --quantize nothing'),
    (('--quantize', 'weights', '--threshold', 'trainable'), '--threshold trainable has no meaning'),
    (('--quantize', 'nothing', '--rest', -1, '--pooling', 'max'), '--rest -1 has no meaning with --quantize nothing'),
    (('--quantize', 'nothing', '--k', 2), '--k 2 has no meaning with --quantize nothing')])
def test_quantize_beside_other_flags(tmp_path, flags, words):
    with pytest.raises(UsageError, match=words):
        start(tmp_path / 'a', *flags, script='Quant_MNIST' if '--k' in flags else 'TWTA_5_5_MNIST')


def test_a_network_without_ternary_weights_is_not_packed(tmp_path):
    start(tmp_path / 'run', *FLAGS, '--epochs', 1, '--quantize', 'activations')
    with pytest.raises(TwtaError, match='has full-precision weights'):
        start(tmp_path / 'run', '--mode', 'export', '--file', tmp_path / 'net.twta')
    assert not (tmp_path / 'net.twta').exists()
