"""run.py without ComfyUI: the setup's steps and refusals, and a Host over a stand-in of ComfyUI."""

import ast
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from fewstep import run

# Answers /system_stats, as ComfyUI does when it is ready; its own arguments decide how it behaves.
STAND_IN = """
import http.server, json, sys
if "--die" in sys.argv:
    sys.exit("no such model")
print("Traceback (most recent call last):\\n  other pack\\nKeyError: 'a'")
print("Traceback (most recent call last):\\n  our line\\nImportError: no gguf")
print("Cannot import custom_nodes/fewstep module for custom nodes: no gguf", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"system": {"argv": sys.argv}}).encode())
port = int(sys.argv[sys.argv.index("--port") + 1])
try:
    server = http.server.HTTPServer(("127.0.0.1", port), Handler)
except OSError:
    sys.exit("error while attempting to bind on address")
server.serve_forever()
"""


@pytest.fixture
def comfyui(tmp_path):
    """A folder with the stand-in as its main.py."""
    (tmp_path / "main.py").write_text(STAND_IN)
    return tmp_path


def make_host(comfyui, *arguments):
    return run.Host(comfyui, comfyui / "base", sys.executable, arguments)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def is_alive(pid):
    """Whether the process runs; one that has ended and waits for its parent does not."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


# ---- setup ---------------------------------------------------------------------------------------


def test_an_old_python_can_read_the_file_far_enough_to_say_so():
    ast.parse((run.ROOT / "run.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_a_setup_without_network_says_so_and_replaces_a_broken_environment(tmp_path):
    shutil.copy(run.ROOT / "run.py", tmp_path)
    interpreter = tmp_path / run.PYTHON.relative_to(run.ROOT)
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(tmp_path / "gone")  # as after an upgrade of the system's Python
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    environment["PIP_CONFIG_FILE"] = os.devnull
    command = [sys.executable, tmp_path / "run.py", "test"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert interpreter.exists()
    assert "Check the network" in done.stderr
    assert str(tmp_path / ".host" / "setup.log") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "log, words",
    [
        ("The virtual environment was not created: ensurepip is not", "apt install python3-venv"),
        ("OSError: [Errno 28] No space left on device", "disk space"),
        ("NewConnectionError: Temporary failure in name resolution", "network"),
        ("ERROR: No matching distribution found for torch==2.13.0", "Python 3.12"),
        ("something new", "again"),
    ],
)  # fmt: skip
def test_a_failed_step_names_the_remedy(log, words):
    assert words in run.remedy([log + "\n"])


def sdist(path, *members):
    """An archive of (name, type, content or link target)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), content.decode()
            archive.addfile(member, io.BytesIO(content))
    return path


def test_only_comfyui_is_unpacked_and_no_links(tmp_path):
    archive = sdist(
        tmp_path / "a.tar.gz",
        ("pkg/setup.py", tarfile.REGTYPE, b"outside"),
        ("pkg/vendor/ComfyUI/main.py", tarfile.REGTYPE, b"main"),
        ("pkg/vendor/ComfyUI/comfy/sd.py", tarfile.REGTYPE, b"sd"),
        ("pkg/vendor/ComfyUI/link", tarfile.SYMTYPE, b"/etc"),
    )
    run.unpack_comfyui(archive, tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert found == {"main.py", "comfy", "comfy/sd.py"}


def test_a_path_that_climbs_out_is_refused(tmp_path):
    climbing = "pkg/vendor/ComfyUI/../../../evil.py"
    archive = sdist(tmp_path / "a.tar.gz", (climbing, tarfile.REGTYPE, b"evil"))
    with pytest.raises(run.Failure, match="outside its folder"):
        run.unpack_comfyui(archive, tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("evil.py"))


def test_the_lock_is_held_until_its_file_closes(tmp_path):
    with open(tmp_path / "lock", "a") as first, open(tmp_path / "lock", "a") as second:
        assert run.try_lock(first)
        assert not run.try_lock(second)
        first.close()
        assert run.try_lock(second)


def test_the_pack_is_linked_again_when_the_checkout_has_moved(tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "fewstep").symlink_to(tmp_path / "gone")
    run.link_pack(tmp_path)
    run.link_pack(tmp_path)
    assert (tmp_path / "custom_nodes" / "fewstep" / "run.py").samefile(run.ROOT / "run.py")


def test_requirements_leave_out_what_is_pinned_elsewhere(tmp_path):
    lines = (
        "torch\ntorchsde\ntorchvision\ntorchaudio\nnumpy>=1.25.0\n\n# note\n-e .\nav>=16 # why\n"
    )
    (tmp_path / "requirements.txt").write_text(lines)
    assert run.read_requirements(tmp_path) == ["torchsde", "numpy>=1.25.0", "av>=16"]


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["demo", "--workflow", "no.json"], "There is no workflow no.json"),
        (["demo", "--workflow", "pyproject.toml"], "no JSON"),
        (["demo", "--workflow", "workflows/demo.json"], "Export (API)"),
        (["demo", "--workflow", "workflows"], "--workflow needs a file to read"),
        (["demo", "--out", "README.md"], "--out must be a folder"),
        (["demo", "--steps", "0"], "from 1 to 1000"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--bogus"], "unrecognized arguments"),
        (["paint"], "'demo', 'test'"),
        ([], "required: command"),
    ],
)
def test_wrong_arguments_are_answered_before_any_setup(arguments, words):
    command = [sys.executable, "run.py", *arguments]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode != 0
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_comfyui_path_is_named():
    environment = {**os.environ, "COMFYUI_PATH": "nowhere"}
    command = [sys.executable, "-c", "import run; run.comfyui_folder()"]
    done = subprocess.run(command, cwd=run.ROOT, env=environment, capture_output=True, text=True)
    assert "COMFYUI_PATH is nowhere" in done.stderr


# ---- the workflow --------------------------------------------------------------------------------

GRAPH = {
    "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["9", 1]}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["9", 1]}},
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 5, "steps": 20, "positive": ["1", 0], "negative": ["2", 0]},
    },
    "4": {"class_type": "RandomNoise", "inputs": {"noise_seed": 6}},
    "5": {"class_type": "BasicScheduler", "inputs": {"steps": ["3", 0]}},
    "6": {"class_type": "FewStepSample", "inputs": {"seed": ["7", 0]}},
    "7": {"class_type": "PrimitiveInt", "inputs": {"value": 5}},
    "8": {"class_type": "RandomNoise", "inputs": {"noise_seed": 6}},  # as 4
    "9": {"class_type": "FewStepSample", "inputs": {"seed": ["10", 0]}},
    "10": {"class_type": "Sum", "inputs": {"value": 5}},
}


def test_values_go_where_the_workflow_has_such_inputs_and_leave_it_as_it_was():
    before = json.dumps(GRAPH)
    graph = run.fill_in(GRAPH, prompt="a dog", seed=7, steps=8)
    assert json.dumps(GRAPH) == before
    assert graph["1"]["inputs"]["text"] == "a dog" == run.prompt_of(graph)
    assert graph["2"]["inputs"]["text"] == "blurry"  # it only feeds `negative`
    assert graph["3"]["inputs"]["seed"] == graph["4"]["inputs"]["noise_seed"] == 7
    assert graph["3"]["inputs"]["steps"] == 8
    assert graph["5"]["inputs"]["steps"] == ["3", 0]  # linked, so not ours to set
    assert graph["6"]["inputs"]["seed"] == ["7", 0]
    assert graph["7"]["inputs"]["value"] == 7  # a number that several nodes share
    assert graph["8"]["inputs"]["noise_seed"] == 7 and graph["10"]["inputs"]["value"] == 5


@pytest.mark.parametrize("name", ["prompt", "seed", "steps"])
def test_a_value_without_a_place_is_refused(name):
    graph = {"1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}}}
    with pytest.raises(run.Failure, match=f"--{name}"):
        run.fill_in(graph, **{name: 1})


def test_prompts_outside_the_demos_grammar_are_named(capsys):
    run.warn_of_unknown(["a red ring on a blue background", "a red ring", "a dog on a background"])
    *noted, grammar = capsys.readouterr().out.splitlines()
    assert len(noted) == 2 and "'a red ring': it does not say" in noted[0]
    assert "'a dog on a background'." in noted[1]
    assert "three orange triangles on a cyan background" in grammar
    run.warn_of_unknown(run.DEMO_PROMPTS)
    assert not capsys.readouterr().out


def test_file_names_are_safe_short_and_distinct():
    taken = set()
    prompts = [
        "A red, RED circle!",
        "a red red circle",
        "../../etc/passwd",
        "红色圆",
        "?",
        "x" * 500,
    ]
    names = [run.unused_name(prompt, taken) for prompt in prompts]
    assert names[:5] == [
        "a-red-red-circle.png",
        "a-red-red-circle-2.png",
        "etc-passwd.png",
        "红色圆.png",
        "picture.png",
    ]
    assert len(names[5]) == 64


def test_refusals_and_errors_name_the_node():
    graph = {"4": {"class_type": "VAEDecode", "inputs": {}, "_meta": {"title": "Decode"}}}
    problem = {"message": "Value not in list", "details": "vae_name: 'x' not in []"}
    refusal = {"error": {"message": "invalid prompt"}, "node_errors": {"4": {"errors": [problem]}}}
    told = run.describe_refusal(graph, refusal)
    assert "node 4, Decode: Value not in list: vae_name" in told
    assert told.endswith(
        "A file that is missing goes where README.md, Which file goes where, says."
    )
    error = {"node_id": "4", "exception_type": "ValueError", "exception_message": "bad file\n"}
    said = run.describe_error(graph, [["execution_start", {}], ["execution_error", error]])
    assert said == "node 4, Decode: ValueError: bad file"


# ---- ComfyUI as a process ------------------------------------------------------------------------


def test_the_host_answers_and_ends_with_its_block(comfyui):
    with make_host(comfyui) as host:
        assert "--listen" in host.get("/system_stats")["system"]["argv"]
        pid, scratch = host.process.pid, host.scratch
    assert not is_alive(pid) and not scratch.exists()


def test_a_host_that_dies_shows_its_last_words_and_keeps_its_log(comfyui):
    host = make_host(comfyui, "--die")
    with pytest.raises(run.Failure, match="no such model"), host:
        pass
    assert host.log.exists()
    shutil.rmtree(host.scratch)


def test_a_start_that_is_broken_off_leaves_nothing(comfyui):
    class BrokenOff(run.Host):
        def wait_until_ready(self):
            raise KeyboardInterrupt

    host = BrokenOff(comfyui, comfyui / "base", sys.executable)
    with pytest.raises(KeyboardInterrupt), host:
        pass
    assert not is_alive(host.process.pid) and not host.scratch.exists()


def test_a_pack_that_comfyui_could_not_import_shows_its_traceback(comfyui):
    with (
        pytest.raises(run.Failure, match=r"no node FewStepSample") as raised,
        make_host(comfyui) as host,
    ):
        host.require_nodes({"FewStepSample"})
    shutil.rmtree(host.scratch)
    assert "our line" in str(raised.value) and "ImportError: no gguf" in str(raised.value)
    assert "other pack" not in str(raised.value)


def test_a_port_that_was_taken_meanwhile_is_changed(comfyui):
    with make_host(comfyui) as other:
        taken = int(other.url.rpartition(":")[2])
        ports = iter([taken, other.free_port()])

        class Unlucky(run.Host):
            def free_port(self):
                return next(ports)

        with Unlucky(comfyui, comfyui / "base", sys.executable) as host:
            assert host.url != other.url


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_no_comfyui_outlives_run_py(comfyui, name):
    """Start a host from a process of its own, end that process, and look for the host."""
    program = f"""
import run, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)
with run.Host(Path({str(comfyui)!r}), Path({str(comfyui / "base")!r}), sys.executable) as host:
    print(host.process.pid, flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=run.ROOT, stdout=pipe, stderr=pipe) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(getattr(signal, name))
        parent.wait(20)
    wait_until(lambda: not is_alive(pid))


@pytest.mark.parametrize("tool", ["distill", "demo"])
def test_another_python_is_told_which_one_to_take(tool):
    bare = [sys.executable, "-S", "-m", tool]  # without site-packages
    ended = subprocess.run(bare, cwd=run.ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "torch is missing" in ended.stderr and str(run.PYTHON.name) in ended.stderr
