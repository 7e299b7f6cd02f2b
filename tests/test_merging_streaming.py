"""How tensors are streamed: in order, within the memory that is promised, and the selection that needs no sort."""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expunge.merging import selection
from expunge.merging.ahead import in_order, leave_room, room
from expunge.merging.selection import coarse_counts, cut, kept_over_model, trimmed

# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_and_within_the_budget(threads):
    held, most, lock = [0], [0], threading.Lock()
    needs = {str(number): (number * 7) % 11 + 1 for number in range(60)} | {"30": 50}  # one needs more than there is

    def work(name):
        with lock:
            held[0] += needs[name]
            most[0] = max(most[0], held[0])
        time.sleep(0.0005 * (needs[name] % 3))
        return int(name)

    for name, result in in_order(work, list(needs), needs=needs.__getitem__, budget=20, threads=threads):
        assert result == int(name)
        if name == "30":
            assert most[0] == 50  # and it was alone
            most[0] = 0
        with lock:
            held[0] -= needs[name]
    assert held[0] == 0
    assert most[0] <= 20


def test_several_threads_work_at_the_same_time():
    meeting = threading.Barrier(2, timeout=10)  # broken unless two come

    turns = in_order(lambda name: meeting.wait(), "abcd", needs=lambda name: 1, budget=4, threads=2)
    assert sorted(turn for _, turn in turns) == [0, 0, 1, 1]  # places at the barrier: two met, twice


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_in_order_is_raised_and_no_more_is_begun(threads):
    begun = []

    def work(name):
        begun.append(name)
        time.sleep(0.01 if name == "3" else 0)
        if name in ("3", "4"):
            raise ValueError(name)
        return name

    names = [str(number) for number in range(1000)]
    results = in_order(work, names, needs=lambda name: 1, budget=1000, threads=threads)
    assert [next(results)[0] for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="3"):
        next(results)
    count = len(begun)
    time.sleep(0.02)
    assert len(begun) == count < 50


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 11, 1 << 10)])
def test_room_is_a_plain_tensor(shape):
    tensor = room(shape)
    assert tensor.shape == shape
    assert tensor.dtype == torch.float32
    assert tensor.fill_(2.5).eq(2.5).all()
    assert tensor.clone().add_(tensor).eq(5).all()


def test_room_is_used_again_only_when_nobody_holds_any_of_it():
    leave_room()
    one = room((512, 256)).fill_(1)
    two = room((512, 256)).fill_(2)
    assert one.data_ptr() != two.data_ptr()
    part, place = one[3:5], one.data_ptr()
    del one
    three = room((512, 256)).fill_(3)
    assert three.data_ptr() not in (place, two.data_ptr())
    assert part.eq(1).all()
    assert two.eq(2).all()
    del part
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert room((256, 512)).data_ptr() == place
    leave_room()
    assert three.eq(3).all()  # what is held stays


# ---------------------------------------------------------------- selection

LARGE = 200_003  # elements: a sample is taken

VALUES = {
    "normal": lambda: torch.randn(LARGE),
    "normal, 2-dimensional": lambda: torch.randn(401, 499),
    "heavy tails": lambda: torch.randn(LARGE).mul(3).exp() * torch.randn(LARGE).sign(),
    "few different values": lambda: torch.randn(LARGE).bfloat16().float(),
    "three values": lambda: torch.randint(-1, 2, (LARGE,)).float(),
    "mostly zeros": lambda: torch.randn(LARGE) * (torch.rand(LARGE) < 0.1),
    "zeros": lambda: torch.zeros(LARGE),
    "rising": lambda: torch.arange(LARGE).float(),
    "what a sample never sees": lambda: torch.where(torch.arange(LARGE) % 7 == 0, torch.randn(LARGE), 1e-9),
    "subnormal": lambda: torch.randn(LARGE) * 1e-40,
}


@pytest.mark.parametrize("values", VALUES)
def test_a_cut_keeps_what_a_stable_sort_would_keep(values):
    torch.manual_seed(0)
    tensor = VALUES[values]()
    flat = tensor.reshape(-1)
    order = flat.abs().argsort(descending=True, stable=True)
    for keep in (1, 2, 150, LARGE // 10, LARGE // 2, LARGE * 4 // 5, flat.numel() - 1):
        expected = torch.zeros_like(flat)
        expected[order[:keep]] = flat[order[:keep]]
        assert torch.equal(trimmed(flat, 0, cut(tensor, keep)), expected), keep


def test_a_sample_saves_the_histograms_and_a_misleading_one_does_not_matter(monkeypatch):
    torch.manual_seed(0)
    flat = torch.randn(LARGE)
    right = cut(flat, LARGE // 2)
    with monkeypatch.context() as patch:
        patch.setattr(selection, "coarse_counts", None)  # not called
        assert cut(flat, LARGE // 2) == right
    for limits in ((0.0, 1e-3), (3.0, 4.0)):  # neither holds the median
        monkeypatch.setattr(selection, "_limits", lambda *_, limits=limits: limits)
        assert cut(flat, LARGE // 2) == right
    monkeypatch.setattr(selection, "_limits", lambda *_: None)
    assert cut(flat, LARGE // 2) == right


def test_one_cut_through_a_model_reads_each_tensor_twice_by_whatever_loop_it_is_given():
    torch.manual_seed(0)
    tensors = {"a": torch.randn(5000), "b": None, "c": torch.randn(3000) * 10, "d": torch.randn(7)}
    sizes = {"a": 5000, "b": 400, "c": 3000, "d": 7}
    whole = torch.cat([torch.zeros(sizes[name]) if part is None else part for name, part in tensors.items()])
    order = whole.abs().argsort(descending=True, stable=True)
    loops = []

    def backwards(work, names):
        loops.append(list(names))
        results = {name: work(name) for name in reversed(names)}
        return ((name, results[name]) for name in names)

    for density in (0.001, 0.2, 0.5, 0.97):
        chosen = torch.zeros(len(whole))
        chosen[order[: round(density * len(whole))]] = 1
        expected = [int(part.sum()) for part in chosen.split(list(sizes.values()))]
        assert list(kept_over_model(tensors.get, sizes, density, backwards).values()) == expected
    assert loops == [list(sizes)] * 8
    assert coarse_counts(whole).sum() == len(whole)


# ---------------------------------------------------------------- memory

MEASURE = textwrap.dedent("""
    import sys, threading, time
    from pathlib import Path
    import torch
    from expunge.merging.plan import plan_merge
    from expunge.merging.run import merge_models

    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def look():
        while not done.is_set():
            highest[0] = max(highest[0], anonymous())
            time.sleep(0.002)

    folder, settings = Path(sys.argv[1]), eval(sys.argv[2])
    plan_merge("ties", 2)  # everything is imported
    start, highest, done = anonymous(), [0], threading.Event()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        merge_models([folder / "a", folder / "b"], folder / "out", base=folder / "base", **settings)
    finally:
        done.set()
        thread.join()
    print(start, highest[0])
""")


ROWS, COLUMNS = 1 << 15, 1 << 9


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """dtype → folder with two models and a base of one large tensor and a few smaller ones."""
    folders = {}

    def folder(dtype):
        if dtype not in folders:
            folders[dtype] = tmp_path_factory.mktemp("large")
            write_large(folders[dtype], dtype, ROWS, COLUMNS)
        return folders[dtype]

    return folder


def write_large(folder, dtype, rows, columns):
    generator = torch.Generator().manual_seed(0)
    base = {"model.embed_tokens.weight": torch.randn(rows, columns, generator=generator)}
    for number in range(6):
        base[f"model.layers.{number}.mlp.up_proj.weight"] = torch.randn(rows // 16, columns, generator=generator)
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        tensors = {key: value.to(dtype, copy=True) for key, value in base.items()}
        for value in tensors.values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.01)
        save_file(tensors, folder / name / "model.safetensors")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.bfloat16, {"density": 0.5, "parameters": {"scope": "model", "scale_match": "model"}}),
        pytest.param(torch.bfloat16, {"density": 0.5, "parameters": {"scale_match": "tensor"}}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"density": 0.5}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"method": "linear"}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"method": "dare_ties", "density": 0.5}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"method": "della", "density": 0.5}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"method": "sce", "density": 0.5}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"method": "slerp"}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"method": "model_stock"}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"density": 0.5, "parameters": {"scope": "model"}}, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_anonymous_memory_is_inputs_and_two_of_the_largest_tensor(large, dtype, settings):
    folder = large(dtype)
    command = [sys.executable, "-c", MEASURE, str(folder), repr(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(folder / "out")
    start, highest = map(int, done.stdout.split())
    largest = 4 * ROWS * COLUMNS  # in float32, in which it is computed
    print(settings, f"{(highest - start) / largest:.2f} × the largest tensor, {start / 1e6:.0f} MB before")
    assert highest <= (2 + 2) * largest + 300e6
    # the 300 MB are for the interpreter and torch; the merge itself must do with little of them
    assert highest - start <= (2 + 2) * largest + 60e6
    assert highest - start >= 2 * largest  # the measurement sees the tensors
