"""Prompts about one volume share its prefill: the same answers as apart, fewer tokens prefilled; given answers judged from the
same cache as the plain forward pass judges them. On meshes, stacked and split."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_engine import DECODER, EXPERIMENT, build

from jaxmed.config import RopeConfig
from jaxmed.data.inputs import VisualInput
from jaxmed.generate import features
from jaxmed.generate.engine import Counts, Engine, Limits
from jaxmed.generate.prompts import Prompt, bucket_of, left_padded, prompt_length, put
from jaxmed.generate.sampling import Sampling
from jaxmed.generate.scheduler import Scheduler, Task, run_all
from jaxmed.generate.sharing import ALONE, Split, split_of
from jaxmed.models import decoder
from jaxmed.nn.cache import ROOT, fork
from jaxmed.sharding import generation_rules

NEW, END, GREEDY = 6, 17, Sampling()
WIDE = dataclasses.replace(DECODER, width=32, layers=2, heads=8, mlp=48, window=13)
SMALL = dataclasses.replace(EXPERIMENT, model=dataclasses.replace(EXPERIMENT.model, decoder=WIDE))
MORE = [((1, 1, 1, 1), False), ((2, 1, 1, 2), True), ((1, 1, 4, 1), True), ((1, 2, 2, 1), False)]


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def engine_of(shape=(1, 1, 1, 1), split=True, experiment=SMALL):
    return compiled(shape, split, experiment)


@functools.cache
def compiled(shape, split, experiment):
    graphdef, params, mesh, _ = build(split, shape, experiment)
    rules = generation_rules(experiment, dict(mesh.shape))
    return Engine(graphdef, params, experiment, mesh, rules, Limits(eos_ids=(END,), blocked=(90, 91)))


def words(rng, count):
    return rng.integers(0, 90, count)


def ids(*pieces):
    return np.concatenate([np.atleast_1d(p) for p in pieces]).astype(np.int32)


def study(seed=0, rests=(5, 1, 9), images=1):
    """Prompts that begin alike, with an image between words; how they go on has odd lengths."""
    rng = np.random.default_rng(seed)
    shown = tuple(VisualInput(rng.standard_normal((6, 5)).astype(np.float32), (1, 2, 3)) for _ in range(images))
    head = ids(words(rng, 3), *[ids(-200, words(rng, 2)) for _ in shown], 7)
    return [Prompt(ids(head, 20 + n, words(rng, rest)), shown) for n, rest in enumerate(rests)]


def text_alone(seed=0):
    return Prompt(words(np.random.default_rng(seed), 11).astype(np.int32), ())


def answers(engine, studies, rows=4, sampling=GREEDY, least=1, continuations=None):
    """Of all prompts, by (study, prompt)."""
    engine.counts = Counts()
    scheduler = Scheduler(engine, SMALL, rows, sampling, NEW, least)
    tasks = [
        [Task((s, p), prompt, f"{s}.{p}", 0, continuations[s, p] if continuations else ()) for p, prompt in enumerate(prompts)]
        for s, prompts in enumerate(studies)
    ]
    return {answered.task.name: answered for answered in run_all(scheduler, tasks)}


STUDIES = [study(0), [text_alone(3)], study(2, (3, 3, 8, 4, 1))]


@pytest.fixture(scope="module")
def apart():
    """Each prompt in a row of its own."""
    engine = engine_of()
    alone = [[prompt] for prompts in STUDIES for prompt in prompts]
    found = answers(engine, alone)
    assert engine.counts.prefilled == engine.counts.prompted
    names = [(s, p) for s, prompts in enumerate(STUDIES) for p in range(len(prompts))]
    return {name: found[n, 0].ids.tolist() for n, name in enumerate(names)}


@pytest.mark.parametrize(("shape", "split"), [((1, 1, 1, 1), True), ((1, 1, 2, 2), False)])
def test_answers_are_those_of_prompts_apart(shape, split, apart):
    same_as_apart(shape, split, apart)
    assert len({tuple(made) for made in apart.values()}) > len(apart) - 2, "prompts differ in their answers"
    assert any(made[-1] == END for made in apart.values()), "one ends before the others"


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "split"), MORE)
def test_answers_are_those_of_prompts_apart_on_more_meshes(shape, split, apart):
    same_as_apart(shape, split, apart)


def same_as_apart(shape, split, apart):
    engine = engine_of(shape, split)
    found = answers(engine, STUDIES, least=shape[0] * shape[1])
    assert {name: answered.ids.tolist() for name, answered in found.items()} == apart


def test_what_is_left_of_prompts_goes_in_pieces_where_it_is_long(monkeypatch, apart):
    """Three times sixteen tokens against the cache, sixteen at a time."""
    monkeypatch.setattr(decoder, "SCORES", 1)
    found = answers(compiled.__wrapped__((1, 1, 1, 1), True, SMALL), [STUDIES[0]])
    assert {name: answered.ids.tolist() for name, answered in found.items()} == {name: apart[name] for name in found}


def test_tokens_are_counted():
    engine = engine_of()
    found = answers(engine, STUDIES)
    every = [prompt_length(prompt, SMALL) for prompts in STUDIES for prompt in prompts]
    assert (engine.counts.prompted, engine.counts.answers) == (sum(every), 9)
    head = 3 + 6 + 2 + 1  # words, image, words: shared by all of a study; of five prompts, rows of four and of one
    assert engine.counts.prefilled == sum([head + 5 + 1 + 9 + 3, 11, 2 * head + 3 + 3 + 8 + 4 + 1 + 5])
    assert engine.counts.generated == sum(len(answered.ids) for answered in found.values())
    programs = engine.compilations
    answers(engine, [study(7, (9, 9, 2)), [text_alone(5)], study(8, (1, 1, 1, 7))])
    assert engine.compilations == programs, "few shapes, each compiled once"


def test_draws_are_those_of_prompts_apart():
    engine, warm = engine_of(), Sampling(temperature=1.4, top_k=30, repetition_penalty=1.3, seed=5)
    together = answers(engine, [STUDIES[0]], sampling=warm)
    scheduler = Scheduler(engine, SMALL, 4, warm, NEW)
    for p, prompt in enumerate(STUDIES[0]):
        scheduler.add(Task((0, p), prompt, f"0.{p}", 0))
    alone = {a.task.name: a.ids.tolist() for a in scheduler.run(scheduler.largest()) for a in a}
    assert {name: a.ids.tolist() for name, a in together.items()} == alone


# -- likelihoods -----------------------------------------------------------------------------------------------------------


def expected(engine, prompt, continuation):
    """From the forward pass over the whole sequence, without a cache."""
    whole = dataclasses.replace(prompt, ids=ids(prompt.ids, continuation))
    batch = put(left_padded([whole], 1, bucket_of(whole, SMALL), SMALL), engine.mesh, engine.rules)
    logits = np.asarray(engine.apply(features.logits, batch))[0]
    shares = np.asarray(jax.nn.log_softmax(logits, axis=-1))[-len(continuation) - 1 : -1]
    return shares[np.arange(len(continuation)), continuation]


def asked():
    rng = np.random.default_rng(8)
    lengths = {0: (1, 4, 2), 1: (3, 3), 2: (1, 5)}
    names = [(s, p) for s, prompts in enumerate(STUDIES) for p in range(len(prompts))]
    return {name: tuple(words(rng, n).astype(np.int32) for n in lengths[name[0]]) for name in names}


@pytest.fixture(scope="module")
def wanted():
    engine, given = engine_of(), asked()
    some = [(0, 1), (1, 0), (2, 4)]
    return {name: [expected(engine, STUDIES[name[0]][name[1]], c) for c in given[name]] for name in some}


@pytest.mark.parametrize(("shape", "split"), [((1, 1, 1, 1), True), pytest.param((1, 1, 2, 2), False, marks=pytest.mark.slow)])
def test_likelihoods_are_those_of_the_forward_pass(shape, split, wanted):
    engine = engine_of(shape, split)
    found = answers(engine, STUDIES, continuations=asked())
    for name, theirs in wanted.items():
        ours = found[name].likelihoods
        assert [len(o) for o in ours] == [len(t) for t in theirs] and not len(found[name].ids)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    assert engine.counts.scored == sum(len(c) for some in asked().values() for c in some)


# -- what is shared --------------------------------------------------------------------------------------------------------


def test_what_prompts_share_ends_before_the_first_difference():
    prompts = study()
    assert split_of(prompts, SMALL, 8, NEW) == Split(7, 3, 16)
    assert split_of(prompts, SMALL, 2, NEW).branches == 2, "as many prompts as may be decoded together"
    assert split_of(prompts[:1], SMALL, 8, NEW) == ALONE
    same = [prompts[0], prompts[0]]
    assert split_of(same, SMALL, 8, NEW).length == len(prompts[0].ids) - 1, "each keeps a token to be asked with"


def test_an_image_behind_the_difference_is_not_shared():
    image = study()[0].images
    late = [Prompt(ids(5, 20 + n, -200, 3), image) for n in range(3)]
    assert split_of(late, SMALL, 8, NEW) == ALONE
    engine = engine_of()
    answers(engine, [late])
    assert engine.counts.prefilled == engine.counts.prompted


def test_ids_below_image_tokens_do_not_matter():
    """Template m3d: image tokens lie on places that the text has; the last may cover a word where no BOS stands first."""
    image = study()[0].images
    prompts = [
        Prompt(ids([50] * 6, 30 + n, 4, 40 + n, [9] * n, 3), image, 1) for n in (0, 2, 5)
    ]  # places 1 to 6, a word under the last
    split = split_of(prompts, SMALL, 8, NEW)
    assert split.length == 8
    together, alone = (answers(engine_of(), some) for some in ([prompts], [[p] for p in prompts]))
    assert [together[0, n].ids.tolist() for n in range(3)] == [alone[n, 0].ids.tolist() for n in range(3)]


def test_prompts_on_both_sides_of_longropes_limit_stay_apart():
    """One list of frequencies rotates the shared keys."""
    factors = {"short_factors": (1.0, 1.5), "long_factors": (2.0, 3.0)}
    rope = RopeConfig(theta=700.0, scaling="longrope", original_positions=25, attention_factor=1.0, **factors)
    model = dataclasses.replace(SMALL.model, decoder=dataclasses.replace(WIDE, rope=rope))
    experiment = dataclasses.replace(SMALL, model=model)
    prompts = study(rests=(3, 4, 11))
    lengths = [prompt_length(p, experiment) for p in prompts]
    assert [n - 1 + NEW >= 25 for n in lengths] == [False, False, True]
    assert split_of(prompts, experiment, 8, NEW) == ALONE
    assert split_of(prompts[:2], experiment, 8, NEW).length == 7


def test_branches_of_branches():
    twice = fork(fork(ROOT, 2), 2)
    assert [lineage[:-1] for lineage in twice] == [(0, 1), (0, 1), (0, 2), (0, 2)]
    own = [lineage[-1] for lineage in twice]
    assert len({0, 1, 2, *own}) == 7, "every branch has its number"
