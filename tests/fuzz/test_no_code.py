"""What must not stand in our code, so that no file can bring code of its own."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("lit_align/**/*.py"), *ROOT.glob("kernels/**/*.py")])
FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.loads", "marshal.load", "joblib.load", "yaml.load", "yaml.unsafe_load", "shelve.open",
    "jinja2.Template", "torch.jit.load", "torch.hub.load", "dill.load", "dill.loads",
    "np.memmap", "numpy.memmap",
}  # fmt: skip
# Who starts programs: pip, for the embedded model; the benchmark's own worker; triton's tools.
STARTS_PROGRAMS = {"gguf_alias.py", "launch.py", "assembly.py"}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def calls():
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.Call):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                yield path, ast.unparse(node.func), keywords


CALLS = list(calls())


def places(wanted) -> list[str]:
    return [f"{p.relative_to(ROOT)}: {n}" for p, n, keywords in CALLS if wanted(n, keywords)]


def test_nothing_unpickles_evaluates_or_asks_a_shell():
    assert places(lambda name, _: name in FORBIDDEN_CALLS) == []
    assert places(lambda _, keywords: keywords.get("shell", "False") != "False") == []


def test_programs_are_started_by_a_list_of_words_and_in_known_places():
    starts = {p.name for p, n, _ in CALLS if n.startswith("subprocess.")}
    assert starts == STARTS_PROGRAMS


def test_torch_reads_weights_only():
    assert len(places(lambda name, _: name == "torch.load")) >= 1
    unsafe = places(lambda n, k: n == "torch.load" and k.get("weights_only") != "True")
    assert unsafe == []


def test_what_makes_html_escapes():
    made = [k for _, n, k in CALLS if n == "jinja2.Environment"]
    assert made and all(k.get("autoescape") == "True" for k in made)


def test_archives_are_not_unpacked_whole_and_numpy_reads_no_pickles():
    assert places(lambda name, _: name.endswith((".extractall", ".extract"))) == []
    assert places(lambda name, k: "allow_pickle" in k and k["allow_pickle"] != "False") == []


def test_remote_code_is_off_unless_it_is_asked_for():
    given = [(p, n, k["trust_remote_code"]) for p, n, k in CALLS if "trust_remote_code" in k]
    asked = {"False", "trust_remote_code", "h.trust_remote_code"}  # an option that is handed on
    assert given and {value for _, _, value in given} <= asked
    assert [d for path in FILES for d in defaults(path, "trust_remote_code") if d != "False"] == []


def defaults(path: Path, argument: str) -> list[str]:
    """The defaults of an argument of that name, in all functions of a file."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef):
            named = node.args.args[len(node.args.args) - len(node.args.defaults) :]
            pairs = [*zip(named, node.args.defaults, strict=True)]
            pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            found += [ast.unparse(d) for a, d in pairs if a.arg == argument and d is not None]
    return found


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
def test_every_folder_is_read_with_remote_code_switched_off_or_asked_for(name):
    """Left out, transformers asks at the terminal whether to run it."""
    made = places(lambda n, _: n == f"{name}.from_pretrained")
    said = places(lambda n, k: n == f"{name}.from_pretrained" and "trust_remote_code" in k)
    assert made and made == said
