"""Steps beside which libraries allocate memory too; and how much of a GPU is left to PyTorch then."""

import pytest

torch = pytest.importorskip("torch", reason="the extra llm-pilot-tuner[torch] is not installed")

from llmpilot_perfmodel.step_memory.batch import Batch, Rows  # noqa: E402
from llmpilot_tuner.domain.probing import Outcome  # noqa: E402
from llmpilot_tuner.probes.worker_messages import CaseResult  # noqa: E402
from llmpilot_tuner.torch_worker.in_process import InProcess  # noqa: E402
from llmpilot_tuner.torch_worker.meter_cuda import CudaGauge  # noqa: E402

CAPACITY = 1000
BATCH = Batch(case="step", decode=(Rows(request_count=1, input_tokens=1),))


class Device:
    """An allocator that keeps all it may have, and a library that takes something beside it in the first step."""

    def __init__(self, *, needed: int, library: int) -> None:
        self.needed, self.library = needed, library
        self.live_bytes = self.peak_bytes = self.beside = self.kept = self.step_count = 0
        self.limit = CAPACITY

    @property
    def reserved_bytes(self) -> int:
        """What is kept, and what is beside it."""
        return self.kept + self.beside

    def run(self, batch: Batch) -> None:
        """Take what is needed, and keep more."""
        del batch
        self.step_count += 1
        if self.needed > self.limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB")
        self.kept, self.peak_bytes, self.beside = self.limit, self.needed, self.library

    def reset_peak(self) -> None:
        """Leave the allocator what is left."""
        self.limit = CAPACITY - self.beside

    def give_back(self) -> None:
        """Keep nothing."""
        self.kept = 0

    def await_step(self) -> None:
        """Be done."""

    def problem(self) -> str:
        """Nothing can go wrong."""
        return ""


@pytest.mark.parametrize(
    ("needed", "library", "outcome", "step_count", "soak"),
    [
        (900, 0, Outcome.PASSED, 1, False),
        (900, 100, Outcome.PASSED, 2, False),
        (900, 100, Outcome.PASSED, 2, True),
        (901, 100, Outcome.OUT_OF_MEMORY, 2, True),
        (1001, 0, Outcome.OUT_OF_MEMORY, 1, False),
    ],
)
def test_unused_pieces_make_room_for_libraries_and_what_is_in_use_does_not(
    needed: int, library: int, outcome: Outcome, step_count: int, soak: bool
) -> None:
    device = Device(needed=needed, library=library)
    steps = InProcess(device, device, capacity_bytes=CAPACITY, on_gpu=True)
    (answer,) = steps.run([BATCH], soak=soak)
    assert isinstance(answer, CaseResult)
    assert answer.outcome is outcome
    assert bool(answer.message) is (outcome is Outcome.OUT_OF_MEMORY)
    assert device.step_count == step_count


@pytest.mark.parametrize(
    ("reserved", "beside", "left"), [(50, 30, 600), (50, 50, 600), (50, 51, 599), (0, 30, 570), (50, 700, 0)]
)
def test_what_is_beside_pytorch_has_the_reserve_and_then_the_capacity(
    reserved: int, beside: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GPU of 1,000 bytes PyTorch holds 200, and a GPU of 600 bytes and the reserve is meant."""
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000 - 200 - beside, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 200)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 200)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: fractions.append(share))
    gauge = CudaGauge(0, capacity_bytes=600, reserved_bytes=reserved)
    gauge.hold()
    assert fractions == [left / 1000]
    assert gauge.reserved_bytes == 200 + max(beside - reserved, 0)
