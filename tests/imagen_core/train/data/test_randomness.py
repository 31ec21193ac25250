"""Random numbers: functions of the seed and the sample's number alone, and of the right distribution."""

import torch

from imagen_core.train.data.randomness import RandomStream, SampleColumn, mix, sample_numbers, sample_uniform

CPU = torch.device("cpu")


def test_a_sample_has_the_same_numbers_in_any_batch() -> None:
    full = sample_numbers(3, range(10, 18), (3, 4, 4), low_res=True, device=CPU)
    part = sample_numbers(3, range(13, 15), (3, 4, 4), low_res=True, device=CPU)
    for name in ("time", "uniform", "noise", "low_res_noise"):
        assert torch.equal(getattr(part, name), getattr(full, name)[3:5])


def test_samples_and_seeds_differ() -> None:
    numbers = sample_numbers(3, range(64), (3, 4, 4), low_res=True, device=CPU)
    other = sample_numbers(4, range(64), (3, 4, 4), low_res=True, device=CPU)
    assert numbers.low_res_noise is not None
    rows = torch.cat([numbers.noise, numbers.low_res_noise, other.noise]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 3 * 64
    assert not torch.isclose(numbers.time, other.time).any()
    assert len(torch.unique(numbers.uniform)) == 64 * 5


def test_distributions() -> None:
    numbers = sample_numbers(0, range(4000), (3, 4, 4), low_res=False, device=CPU)
    assert numbers.low_res_noise is None
    assert abs(float(numbers.noise.mean())) < 0.01
    assert abs(float(numbers.noise.var()) - 1) < 0.02
    correlation = torch.corrcoef(torch.cat([numbers.uniform, numbers.time[:, None]], dim=1).T) - torch.eye(6)
    assert float(correlation.abs().max()) < 0.06
    for column in (*numbers.uniform.T, numbers.time):
        counts = torch.histc(column, 20, 0, 1)
        assert float(((counts - 200) ** 2 / 200).sum()) < 45  # chi squared of 19 degrees of freedom


def test_times_of_a_batch_cover_all_noise_levels() -> None:
    for first in (0, 12345, 10**9):
        times = sample_numbers(7, range(first, first + 64), (1, 1, 1), low_res=False, device=CPU).time.sort().values
        gaps = torch.diff(times, prepend=times[-1:] - 1)
        assert float(gaps.max()) < 3 / 64
        assert float(gaps.min()) > 0.3 / 64


def test_mix_separates_neighbours_and_is_frozen() -> None:
    """A resumed run relies on these numbers; a change here changes every training."""
    assert len({mix(a, b, c) for a in range(20) for b in range(20) for c in range(20)}) == 8000
    assert all(0 <= mix(a) < 2**63 for a in range(1000))
    assert mix(1, 2) != mix(2, 1)
    assert mix(0) == 0xE220A8397B1DCDAF >> 1  # the first number of SplitMix64 from state 0
    assert [mix(0), mix(1, 2, 3)] == [8147104208329303767, 3851293329796251419]


def test_random_streams_and_columns_are_frozen() -> None:
    """The values are hashed into the seeds of every training: names may change, numbers may not."""
    assert [stream.value for stream in RandomStream] == [*range(7), *range(10, 21)]
    assert (RandomStream.NOISE, RandomStream.WEIGHTS, RandomStream.DROP_ALL) == (1, 5, 16)
    assert [column.value for column in SampleColumn] == [0, 1, 2, 3, 4]
    assert (SampleColumn.DROP_TEXT, SampleColumn.FLIP) == (0, 4)
    sampled = sample_uniform(1, [2], RandomStream.SAMPLE, count=5)[0].tolist()
    assert sampled[:3] == [0.2060701955105686, 0.4812224156734892, 0.37850297622683793]
    assert sampled[3:] == [0.8330603133058688, 0.6030342376554403]
    assert sample_uniform(1, [2], RandomStream.SAMPLE, count=1)[0].tolist() == sampled[:1]
    assert sample_uniform(1, [2], RandomStream.DROP_LABELS, count=1)[0].tolist() == [0.8158291746321469]
