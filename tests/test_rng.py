import torch

from fv_distill.rng import SampleRng, derive_seed


def test_seeds_are_stable_and_distinct():
    # A literal, so that a change that would break the resume of old runs can't go unnoticed.
    assert derive_seed(0, "noise", 1, 2) == 7982942705303081126
    assert derive_seed(0, "noise", 1, 2) != derive_seed(0, "noise", 12)
    assert derive_seed(0, "1") != derive_seed(0, 1)


def test_draws_belong_to_samples_not_to_batches():
    whole = SampleRng(0, 5, [0, 1, 2, 3])
    part = SampleRng(0, 5, [2, 3])
    assert torch.equal(whole.normal("a", (3, 2))[2:], part.normal("a", (3, 2)))
    assert torch.equal(whole.uniform("a")[2:], part.uniform("a"))
    assert whole.shared_integer("a", 1000) == part.shared_integer("a", 1000)


def test_draws_differ_by_seed_stream_step_and_sample():
    base = SampleRng(0, 1, [0]).normal("a", (4,))
    others = [SampleRng(1, 1, [0]).normal("a", (4,)), SampleRng(0, 2, [0]).normal("a", (4,))]
    others += [SampleRng(0, 1, [1]).normal("a", (4,)), SampleRng(0, 1, [0]).normal("b", (4,))]
    assert all(not torch.equal(base, other) for other in others)


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    rng = SampleRng(0, 1, [0])
    rng.normal("a", (4,)), rng.uniform("b"), rng.shared_integer("c", 3), rng.shared_uniform("d")
    assert torch.equal(before, torch.get_rng_state())


def test_normal_draws_are_normal():
    draws = SampleRng(0, 1, range(64)).normal("a", (256,))
    assert abs(draws.mean().item()) < 0.03 and abs(draws.std().item() - 1) < 0.03
