"""The benchmark script runs through and writes its figures; how fast things are is no test."""

import json

import benchmark
import benchmark_mfd
import benchmark_training
import counters
import pytest
import torch
from accelerate.state import AcceleratorState

import timm_mfd


def measured(parts, tmp_path, **kwargs):
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path / "figures.json"
    args = benchmark.Args(parts, batch_size=4, rounds=1, models=("test_resnet",), output=str(output), **kwargs)
    benchmark.main(args)
    return json.loads(output.read_text())


@pytest.mark.filterwarnings("ignore")
def test_one_command_measures_what_mfd_costs_and_prints_the_table_of_the_readme(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_mfd, "PROCESSES", (1,))
    monkeypatch.setitem(benchmark_mfd.STEPS, "cpu", [(32, False), (16, True)])
    monkeypatch.setattr(timm_mfd.MFDClassificationTask, "compile", lambda task: None)  # takes a minute
    monkeypatch.setattr(benchmark_mfd, "measured_rates", lambda *_: {"operations": 1e12, "bytes": 1e11})
    results = measured(benchmark.Args().parts, tmp_path, max_samples=100)
    assert results["stages"]["stage 0"]["two bare products"]["ratio"] == 1
    assert 0 < results["stages"]["error of max_samples"] < 1
    for case in ("test_resnet, 32 px", "test_resnet, 16 px, compiled"):
        assert results["step"][case]["with MFD"]["median"] > 0
    counted = results["stages"]["stage 1"]["timm_mfd"]
    assert counted["operations"] == pytest.approx(4 * 4 * 32 * 32 * 256**2, rel=1e-3)
    assert min(counted["kernels"], counted["bytes"], counted["limit"]) > 0
    assert results["growth"]["4 x samples"]["ratio"] > 0
    printed = capsys.readouterr().out
    rows = dict(line[2:-2].split(" | ") for line in printed.splitlines() if line.startswith("| ") and len(line) > 5)
    for kind, count in results["counts"].items():
        (row,) = (value for what, value in rows.items() if f"on a GPU, five maps at 64 px, {kind}" in what)
        assert row == f"{count['bytes']:.1f} / {count['operations']:.2f} / {count['kernels']}"
    assert {"MFD of one map with samples x 2, samples x 4, channels x 2"} < rows.keys()


@pytest.mark.filterwarnings("ignore")
def test_what_bounds_training_is_measured(tmp_path, monkeypatch):
    random = benchmark_training.write_random_jpegs
    monkeypatch.setattr(benchmark_training, "write_random_jpegs", lambda root: random(root, 20))
    monkeypatch.setattr(benchmark_training, "BOUNDS_MODELS", ("test_resnet",))
    monkeypatch.setattr(benchmark_training, "BOUNDS_SIDE", 16)
    monkeypatch.setattr(benchmark_training, "measured_rates", lambda *_: {"operations": 1e12, "bytes": 1e11})
    monkeypatch.setattr(timm_mfd.MFDClassificationTask, "compile", lambda task: None)  # takes a minute
    results = measured(("pipeline", "bounds"), tmp_path)
    assert set(results["pipeline"]) == {"timm's loader", "timm_mfd resident", "timm_mfd workers", "decoding once"}
    bounds = results["bounds"]["test_resnet"]
    for variant in ("eager", "compiled"):
        shares = {"data", "launch", "arithmetic", "memory"}
        assert set(bounds[variant]) == {"images_per_second", "kernels", "bytes", "operations"} | shares
        assert all(value > 0 for value in bounds[variant].values())


@pytest.mark.slow
def test_two_processes_send_triangles_and_means_in_one_collective(monkeypatch):
    monkeypatch.setattr(benchmark_mfd, "PROCESSES", (1, 2))
    results = benchmark_mfd.measure_growth(benchmark.Args(batch_size=4, rounds=1), torch.device("cpu"), torch.float32)
    channels = (64, 256, 512, 1024, 2048)
    numbers = sum(c * (c + 1) // 2 for c in channels) + 2 * (5 + sum(channels))
    assert results["1 process"]["bytes"] == 0
    assert (results["2 processes"]["bytes"], results["2 processes"]["collectives"]) == (4 * numbers, 1)


def test_the_straightforward_way_gives_the_same_loss():
    x = benchmark_mfd.resnet50_maps(4, torch.device("cpu"), torch.float32)[2]
    assert benchmark_mfd.straightforward(x).item() == pytest.approx(timm_mfd.mfd_loss(x).item(), rel=1e-4)


def test_traffic_counts_arguments_and_results_once_and_views_not_at_all():
    x, square = torch.ones(10, 100), torch.ones(100, 100)
    with counters.Traffic() as traffic:
        x.T.reshape(2, 500)[0]  # of the transposed one, reshape makes a copy
    assert traffic.bytes == 2 * 4000
    with counters.Traffic() as traffic:
        x @ square
    assert traffic.bytes == 4000 + 40000 + 4000
    with counters.Traffic() as traffic:
        x.add_(torch.ones(1).expand(10, 100))
    assert traffic.bytes == 2 * 4000 + 4 + 4  # the single number is made, then read


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (lambda x, y, out: x.copy_(y), 8000),
        (lambda x, y, out: x.zero_(), 4000),
        (lambda x, y, out: torch.empty_like(x), 0),
        (lambda x, y, out: torch.mm(x, y.T, out=out), 8000 + 400),
        (lambda x, y, out: torch._foreach_add_([x, y], [y, y]), 8000 + 8000 + 8000),
        (lambda x, y, out: torch.mul(x[:5, :1].expand(5, 100), 2.0), 20 + 2000),
        (lambda x, y, out: torch.std_mean(x, 1), 4000 + 40 + 40),
        (lambda x, y, out: x[3:].T, 0),
    ],
)
def test_traffic_is_what_is_read_and_written(call, moved):
    x, y, out = torch.ones(10, 100), torch.ones(10, 100), torch.ones(10, 10)
    with counters.Traffic() as traffic:
        call(x, y, out)
    assert traffic.bytes == moved


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (4, False), (8, True)])
def test_operations_of_convolutions_are_those_of_a_loop_also_in_groups_and_backward(groups, bias):
    convolution = torch.nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=groups, bias=bias)
    x = torch.randn(5, 8, 6, 6, requires_grad=True)
    with counters.Operations() as forward:
        out = convolution(x)
    with counters.Operations() as backward:
        out.sum().backward()
    multiplications = sum(8 // groups * 9 for _image in range(5) for _place in range(3 * 3) for _channel in range(16))
    assert forward.total == 2 * multiplications
    assert backward.total == 2 * forward.total
    with counters.Operations() as of_weights_alone:
        convolution(x.detach()).sum().backward()
    assert of_weights_alone.total == 2 * forward.total


def test_operations_of_a_transposed_convolution_are_those_of_a_loop():
    convolution = torch.nn.ConvTranspose2d(8, 4, 3, stride=2)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with counters.Operations() as operations:
        convolution(x).sum().backward()
    multiplications = sum(4 * 9 for _image in range(2) for _place in range(5 * 5) for _channel in range(8))
    assert operations.total == 3 * 2 * multiplications


def test_operations_of_products_are_two_for_each_multiplication():
    with counters.Operations() as operations:
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert operations.total == 2 * 3 * 4 * 5
