"""The command line: precedence, units, refusals and their hints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve_server.cli import server_settings
from jaxserve_server.flags import parse_options

MODULE = [sys.executable, "-m", "jaxserve.serve"]


def options(*argv: str, **environment: str):
    return parse_options(argv, environment)


def refused(capsys, *argv: str, **environment: str) -> str:
    """What a usage error says."""
    with pytest.raises(SystemExit) as exit_info:
        parse_options(argv, environment)
    assert exit_info.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("python -m jaxserve.serve: error: ")
    assert "Traceback" not in text
    return text


def test_defaults():
    found = options()
    assert (found.model, found.host, found.port, found.shutdown_timeout) == ("demo", "127.0.0.1", 8000, 30.0)
    assert found.engine == EngineConfig()
    assert found.given == {}
    assert found.api_key == ()


def test_all_flags_of_the_issue_reach_their_place():
    found = options(
        *("some/folder", "--host", "::1", "--port", "8001", "--api-key", "one", "--api-key", "two"),
        *("--served-model-name", "a", "b", "--dtype", "half", "--max-model-len", "4k", "--block-size", "32"),
        *("--max-num-seqs", "8", "--max-num-batched-tokens", "1K", "--max-num-queued-reqs", "5"),
        *("--queue-timeout", "2.5"),
        *("--kv-cache-memory-bytes", "2GiB", "--gpu-memory-utilization", "0.5", "--num-gpu-blocks-override", "99"),
        *("--kv-cache-dtype", "bfloat16", "--seed", "-3", "--chat-template", "t.jinja", "--tokenizer", "t"),
        *("--revision", "main", "--generation-config", "vllm", "--shutdown-timeout", "1.5"),
        *("--uvicorn-log-level", "warning", "--disable-log-requests", "--root-path", "/api", "--no-async-scheduling"),
        *("--allowed-hosts", "a.example", "--compilation-cache-dir", "none", "--disable-log-stats"),
        *("--max-decode-steps", "4", "--stream-interval-ms", "7.5", "--exact"),
        *("--no-enable-prefix-caching", "--swap-space", "0.5", "--batching-window-ms", "20"),
        "--disable-frontend-multiprocessing",
    )
    assert found.engine == EngineConfig(
        max_model_len=4000,
        block_size=32,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        max_num_queued_reqs=5,
        queue_timeout=2.5,
        kv_cache_memory_bytes=2 * 2**30,
        gpu_memory_utilization=0.5,
        num_gpu_blocks_override=99,
        kv_cache_dtype="bfloat16",
        seed=-3,
        async_scheduling=False,
        compilation_cache_dir=None,
        enable_prefix_caching=False,
        swap_space=0.5,
        max_decode_steps=4,
        stream_interval_ms=7.5,
        exact=True,
        batching_window_ms=20.0,
    )
    assert found.disable_frontend_multiprocessing
    assert not options().disable_frontend_multiprocessing
    assert (found.model, found.api_key, found.served_model_name) == ("some/folder", ("one", "two"), ("a", "b"))
    assert (found.dtype, found.generation_config, found.shutdown_timeout) == ("float16", "vllm", 1.5)
    settings = server_settings(found)
    assert (settings.host, settings.port, settings.shutdown_timeout_s) == ("::1", 8001, 1.5)
    assert (settings.app.root_path, settings.app.allowed_hosts) == ("api", ("a.example",))
    assert not settings.app.log_requests
    assert not settings.log_stats


def test_kserves_stock_command_line_is_taken(tmp_path):
    for name in ("key", "cert"):
        (tmp_path / name).write_text("")
    found = options(
        *("/mnt/models", "--served-model-name", "m", "--port", "8000", "--disable-log-requests", "--api-key=k"),
        *("--enable-ssl-refresh", "--ssl-certfile", str(tmp_path / "cert"), "--ssl-keyfile", str(tmp_path / "key")),
    )
    assert found.enable_ssl_refresh
    assert server_settings(found).refresh_certificates


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("4096", 4096), ("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("2GiB", 2**31), ("2GB", 2 * 10**9)),
        *(("1M", 2**20), ("1m", 10**6), ("3 gb", 3 * 10**9), ("1T", 2**40)),
    ],
)
def test_sizes_have_units(text, value):
    assert options("--kv-cache-memory-bytes", text).engine.kv_cache_memory_bytes == value


@pytest.mark.parametrize("text", ["", "4x", "1.5", "1.0001K", "-1", "0", "1e3", "٤"])
def test_bad_sizes_are_refused(capsys, text):
    assert "--kv-cache-memory-bytes" in refused(capsys, f"--kv-cache-memory-bytes={text}")


def test_underscores_and_aliases():
    assert options("--max_num_seqs=4", "--device-memory-utilization", "0.25").engine == EngineConfig(
        max_num_seqs=4, gpu_memory_utilization=0.25
    )
    assert options("--max-model-len", "auto").engine.max_model_len is None
    assert options("--model", "a-model").model == "a-model"


def test_the_file_goes_below_the_flags_and_above_the_defaults(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: from-file\nport: 9000\nmax_num_seqs: 7\nserved-model-name: [x, y]\nkv-cache-memory-bytes: 1GiB\n"
        "disable-log-requests: true\nasync-scheduling: false\ndisable-log-stats: false\napi-key: [k1, k2]\n"
        "chat-template: '-{{ messages }}'\nseed: null\n"
    )
    found = options("--config", str(file), "--port", "9001", "--served-model-name", "z")
    assert (found.model, found.port, found.served_model_name) == ("from-file", 9001, ("z",))
    assert (found.engine.max_num_seqs, found.engine.kv_cache_memory_bytes) == (7, 2**30)
    assert found.disable_log_requests
    assert not found.engine.async_scheduling
    assert not found.disable_log_stats
    assert found.api_key == ("k1", "k2")
    assert found.chat_template == "-{{ messages }}"
    assert options("positional", "--config", str(file)).model == "positional"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"port: [", "not YAML, line"),
        (b"- a", "must hold"),
        (b"pipeline-parallel-size: 2", "not supported"),
        (b"prot: 1", "did you mean --port"),
        (b"port: x", "--port"),
        (b"\xff\xfe", "UTF-8"),
        (None, "cannot read"),
    ],
)
def test_a_bad_file_is_a_usage_error(capsys, tmp_path, content, said):
    file = tmp_path / "serve.yaml"
    if content is not None:
        file.write_bytes(content)
    assert said in refused(capsys, "--config", str(file))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--enable-lora",), "not supported: --enable-lora: LoRA"),
        (
            ("--prefix_caching_hash_algo", "sha256"),
            "not supported: --prefix-caching-hash-algo: the prefix cache compares",
        ),
        (("--preemption-mode", "swap"), "chosen by measured cost; see --swap-space"),
        (("--swap-space", "-1"), "expected a number of GiB from 0"),
        (("--swap-space", "4GiB"), "such as 4 or 0.5, got '4GiB'"),
        (("--swap-space", "nan"), "GiB"),
        (("--batching-window-ms", "20ms"), "expected 0 to 10000 milliseconds, got '20ms'"),
        (("--batching-window-ms", "nan"), "10000"),
        (("--cpu-offload-gb", "4"), "not supported: --cpu-offload-gb"),
        (("demo", "--quantization", "fp8"), "not supported: --quantization: quantised"),
        (("--speculative-config={}",), "not supported: --speculative-config: speculative"),
        (("--trust-remote-code",), "is never run"),
        (("-pp", "2"), "not supported: '2'; only 1"),
        (("--data-parallel-size=4",), "not supported: '4'; only 1"),
        (("--tensor-parallel-size", "0"), "--tensor-parallel-size"),
        (("--nnodes", "2"), "on the devices of one machine; see --tensor-parallel-size"),
        (("--max-num-seq", "4"), "unknown flag --max-num-seq; did you mean --max-num-seqs?"),
        (("--frobnicate",), "unknown flag --frobnicate\n"),
        (("demo", "other"), "unexpected arguments: other"),
        (("--port", "70000"), "0 to 65535"),
        (("--dtype", "int8"), "expected one of auto"),
        (("--kv-cache-dtype", "fp8"), "invalid choice"),
        (("--gpu-memory-utilization", "1.5"), "share"),
        (("--shutdown-timeout", "-1"), "86400"),
        (("--shutdown-timeout", "nan"), "86400"),
        (("--api-key", " "), "must not be empty"),
        (("--ssl-keyfile", "x"), "both or neither"),
        (("--ssl-keyfile", "/nonexistent", "--ssl-certfile", "/nonexistent"), "cannot read"),
        (("--enable-ssl-refresh",), "needs --ssl-certfile"),
        (("--served-model-name", "name", "/"), "is a folder"),
    ],
)
def test_refusals_say_why(capsys, argv, said):
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(
    "argv",
    [
        ("-pp", "1"),
        ("--data_parallel_size", "1"),
        ("--enable-chunked-prefill",),
        ("--no-enable-log-requests",),
        ("--load-format", "safetensors"),
    ],
)
def test_flags_that_ask_for_what_is_done_anyway_are_taken(argv):
    assert options(*argv).model == "demo"


@pytest.mark.parametrize("argv", [("-tp", "4"), ("--tensor_parallel_size", "4"), ("--tensor-parallel-size=4",)])
def test_the_number_of_devices_reaches_the_engine(argv):
    assert options(*argv).engine.tensor_parallel_size == 4
    assert options().engine.tensor_parallel_size == 1


def test_memory_for_reuse_is_on_unless_it_is_turned_off():
    found = options("--enable-prefix-caching").engine
    assert (found, found.enable_prefix_caching, found.swap_space) == (EngineConfig(), True, 4.0)
    off = options("--no_enable_prefix_caching", "--swap_space=0").engine
    assert (off.enable_prefix_caching, off.swap_space) == (False, 0.0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_a_reachable_host_needs_a_key_or_a_flag_that_insists(capsys, host):
    assert "no API key is set" in refused(capsys, "--host", host)
    assert options("--host", host, "--api-key", "k").api_key == ("k",)
    assert options("--host", host, JAXSERVE_API_KEY="from-environment").api_key == ("from-environment",)
    assert options("--host", host, "--allow-unauthenticated").allow_unauthenticated


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_loopback_needs_no_key_and_answers_local_names_only(host):
    settings = server_settings(options("--host", host))
    assert settings.app.allowed_hosts is not None
    assert "localhost" in settings.app.allowed_hosts


def test_elsewhere_any_name_is_answered():
    assert server_settings(options("--host", "0.0.0.0", "--api-key", "k")).app.allowed_hosts is None
    assert server_settings(options("--allowed-hosts", "*")).app.allowed_hosts is None


def test_keys_are_not_printed_and_flags_go_before_the_environment():
    found = options("--api-key", "sk-secret", "--port", "1", JAXSERVE_API_KEY="other")
    assert found.api_key == ("sk-secret",)
    assert found.given == {"port": 1}
    assert "sk-secret" not in repr(found)


def test_a_bound_of_the_engine_is_a_config_error():
    with pytest.raises(ConfigError, match="power of two, got 24"):
        options("--block-size", "24")


def test_one_line_and_exit_code_1_for_a_config_error(capsys):
    from jaxserve_server.cli import main

    assert main(["--block-size", "24"]) == 1
    assert capsys.readouterr().err == "error: block_size must be a power of two, got 24. Try 16.\n"


def run_module(repo, *argv: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(repo / part) for part in (".", "server", "checkpoints"))
    return subprocess.run(
        [*MODULE, *argv], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False
    )


def test_version_and_exit_codes_of_the_process(repo):
    assert run_module(repo, "--version").stdout.strip() == "0.1.0"
    assert run_module(repo, "--frobnicate").returncode == 2


def test_help_costs_no_heavy_import_and_less_than_300_ms(repo):
    code = (
        "import os, resource, sys; sys.argv = ['serve', '--help']; import jaxserve_server.cli as cli\n"
        "try: cli.main()\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'jax', 'numpy', 'starlette', 'uvicorn', 'yaml', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "spent = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(spent.ru_utime + spent.ru_stime, file=sys.stderr)\n"
    )
    paths = os.pathsep.join(str(repo / part) for part in (".", "server", "checkpoints"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--kv-cache-memory-bytes" in done.stdout
    assert float(done.stderr) < 0.3
