"""What SECURITY.md says is never done: foreign code, connections, processes, files, eval, any unpickling but the restricted one."""

import ast
import json
from pathlib import Path

import pytest
import torch
from faults import ended

import lifeops
from conftest import declare_torchvision_ops
from lifeops import cli
from lifeops.models.deit import VisionTransformer

PACKAGE = Path(lifeops.__file__).parent
KERNELS = Path(__import__("lifeops.kernels").kernels.__file__).parent
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 4}
WATCHED = """
import sys, torch, torch._dynamo
FORBIDDEN = ("socket.connect", "socket.bind", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")

def watch(event, args):
    written = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if event in FORBIDDEN or written:
        raise RuntimeError(f"forbidden: {event} {args}")

sys.addaudithook(watch)
import lifeops
y = lifeops.token_dwconv(torch.ones(1, 5, 4), torch.ones(4, 1, 3, 3, requires_grad=True), grid=(2, 2), num_prefix_tokens=1)
y.sum().backward()
model = lifeops.load_official(sys.argv[1], num_heads=3)
model.eval()(torch.zeros(1, 3, 16, 16))
for event in ("open('x', 'w')", "__import__('os').system('true')"):
    try:
        eval(event)
    except RuntimeError as error:
        assert str(error).startswith("forbidden: ")
    else:
        raise AssertionError("nobody watches")
print("nothing")
"""


def test_no_connection_no_process_no_file(tmp_path):
    attention = lifeops.nn.LifeAttention
    model = VisionTransformer(**SIZES, attn=lambda *sizes: attention(*sizes, aux_key="scale1"))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    assert ended("-B", "-W", "ignore", "-c", WATCHED, tmp_path / "model.pth")[0] == "nothing\n"


def calls(path: Path):
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call) -> dict[str, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords}


def test_the_source_runs_nothing_foreign():
    """No eval, exec or shell; torch.load with weights_only=True alone, transformers without remote code."""
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.hub.load"}
    seen = []
    for path in (*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")):
        for name, call in calls(path):
            assert name not in forbidden, (path, call.lineno)
            assert name.partition(".")[0] not in ("subprocess", "pickle_module", "marshal", "shelve"), (path, call.lineno)
            if name == "torch.load":
                assert keywords(call)["weights_only"] == "True", (path, call.lineno)
                seen.append(name)
            if name.endswith(".from_config"):
                assert keywords(call)["trust_remote_code"] == "False", (path, call.lineno)
            if name.endswith(".from_pretrained"):
                assert keywords(call).items() >= {("trust_remote_code", "False"), ("local_files_only", "True")}, (path, call.lineno)
                seen.append("from_pretrained")
    assert {"torch.load", "from_pretrained"} <= set(seen)


def test_a_folder_with_code_of_its_own_is_refused(tmp_path, capsys, monkeypatch):
    declare_torchvision_ops()
    pytest.importorskip("transformers")
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = {"AutoConfig": "custom.Config", "AutoModelForImageClassification": "custom.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": auto}))
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["rollout", "a.png", "--model", "transformers:.", "--out", "out"])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lifeops rollout: error: ")]
    assert "trust_remote_code" in line
    assert not (tmp_path / "ran").exists()
