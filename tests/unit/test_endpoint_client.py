import socket
import subprocess
import sys

import pytest

from cluster.errors import ConfigError, PortInUse
from services.endpoint.client import ask, base_url, check_port_free, wait_healthy
from services.endpoint.errors import EndpointUnavailable
from services.endpoint.schema import EndpointConfig


def test_client_and_schema_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys, services.endpoint.client, services.endpoint.schema;"
        "assert not {'torch', 'ray', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_check_port_free_names_the_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse) as refused:
            check_port_free("127.0.0.1", port)
        assert f"127.0.0.1:{port}" in str(refused.value)
        assert "serve.port" in str(refused.value)
        assert "\n" not in str(refused.value)
    check_port_free("127.0.0.1", port)


def test_wait_healthy_and_ask_give_up_with_the_reason() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(EndpointUnavailable, match=r"not healthy within 0\.3 s .*refused"):
            wait_healthy(url, 0.3)
        with pytest.raises(EndpointUnavailable, match="no answer"):
            ask(url, "m", "hi", 1)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "http://127.0.0.1:8000"), ("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000")],
)
def test_base_url_is_one_that_can_be_reached(host: str, expected: str) -> None:
    assert base_url(EndpointConfig(host=host)) == expected


def test_app_takes_text_from_the_command_line_and_names_a_wrong_key() -> None:
    from services.endpoint.deployment import app

    built = app({"model_name": "student", "database": "sqlite:///x.db", "poll_s": "0.5", "replicas": "2"})
    arguments, _ = built._bound_deployment.init_args
    assert (arguments["poll_s"], arguments["replicas"]) == (0.5, 2)
    assert built._bound_deployment.num_replicas == 1
    with pytest.raises(ConfigError, match="did you mean model_name"):
        app({"model_nam": "student", "database": "sqlite:///x.db"})
