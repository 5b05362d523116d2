"""Triton that is installed and does not run: found when kernels are chosen.

The GPU is simulated: its capability, its synchronization and the end of a launch. What fails is
real: Triton's builder of launchers, and its assembler's list of architectures.
"""

import pytest
import torch
import triton
from triton.runtime.build import compile_module_from_src
from triton.runtime.errors import OutOfResources

from megatron_came.kernels.backend import UnusableError
from megatron_came.kernels.dispatch import choose
from megatron_came.kernels.triton import probe

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Simulate a GPU of a capability, on which launches end so."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def simulate(launch, capability=(9, 0)):
        probe._problem.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(probe, "step_once", lambda device: launch())

    yield simulate
    probe._problem.cache_clear()


def build_launcher():
    """As Triton does before the first launch of a kernel; without a GPU's libraries."""
    compile_module_from_src("int unused;", "launcher")


def out_of_memory():
    raise OutOfResources(101376, 49152, "shared memory")


def assert_falls_back(*sentences):
    choice = choose("auto", CUDA)
    assert choice.backend.name == "plain"
    assert choice.should_warn
    with pytest.raises(ValueError, match="CAME: kernels 'triton' need triton, which") as refused:
        choose("triton", CUDA)
    for sentence in sentences:
        assert sentence in choice.reason
        assert sentence in str(refused.value)


def test_no_c_compiler(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu(build_launcher)
    assert_falls_back("there is no C compiler", "install gcc, or name a compiler in the variable")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/none/cc", "/none/cc is missing"), ("false", "false fails, see its lines above")],
)
def test_a_c_compiler_that_does_not_work(gpu, monkeypatch, compiler, reason):
    monkeypatch.setenv("CC", compiler)
    gpu(build_launcher)
    assert_falls_back(reason, "name")


def test_an_architecture_that_this_triton_does_not_know(gpu):
    gpu(lambda: pytest.fail("LLVM would end the process"), capability=(99, 0))
    assert_falls_back(
        f"Triton {triton.__version__} does not know the architecture of cuda:0, sm_990",
        "install a newer Triton",
    )


@pytest.mark.parametrize("capability", ["80", "90", "100", "120"])
def test_architectures_that_it_knows(capability):
    assert probe.knows(capability)


def test_too_little_shared_memory(gpu):
    gpu(out_of_memory)
    assert_falls_back("its kernels take 101376 of shared memory, and this GPU has 49152")


def test_any_other_fault(gpu):
    gpu(lambda: [][0])
    assert_falls_back("list index out of range", "make gpu-check")


def test_the_step_that_is_tried_out_is_one():
    """Under the interpreter, or on a GPU."""
    device = CUDA if torch.cuda.is_available() else torch.device("cpu")
    probe.step_once(device)
    probe.check(device) if device.type == "cuda" else None


def test_it_is_tried_once(gpu):
    tried = []
    gpu(lambda: tried.append(1))
    for _ in range(2):
        probe.check(CUDA)
    assert tried == [1]
    gpu(out_of_memory)
    for _ in range(2):
        with pytest.raises(UnusableError):
            probe.check(CUDA)
