"""timm-deconv demo: says where the page is and opens it; what cannot be had ends it with one line."""

import sys
import webbrowser
from pathlib import Path

import pytest
import timm

from tests.demo.pairs import served, small_pair
from timm_deconv.cli import main
from timm_deconv.demo import DemoServer
from timm_deconv.models.weights import save_network


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["timm-deconv", "demo", *words])
    main()


def test_it_says_where_the_page_is_opens_it_and_ends_with_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("resnet18_025_cifar_deconv", "resnet18_025_cifar"):
        save_network(timm.create_model(name), tmp_path / name)
    opened: list[str] = []

    def interrupted(server: DemoServer) -> None:
        opened.append(server.url)
        raise KeyboardInterrupt

    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(DemoServer, "serve_forever", interrupted)
    folders = [str(tmp_path / name) for name in ("resnet18_025_cifar_deconv", "resnet18_025_cifar")]
    run(monkeypatch, "--model", folders[0], "--twin", folders[1], "--port", "0", "--open")
    assert opened[0] == opened[1]
    said = capsys.readouterr().out
    assert said == f"resnet18_025_cifar_deconv beside resnet18_025_cifar: {opened[0]} (Ctrl-C ends it)\n"


def test_a_port_that_is_taken_or_none_ends_it_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(small_pair()) as server:
        for port, message in (
            (str(server.server_port), f"port {server.server_port} is taken; give another by --port, or 0 for any free"),
            ("70000", "port=70000: ports are numbered from 1 to 65535"),
        ):
            with pytest.raises(SystemExit) as ended:
                run(monkeypatch, "--port", port)
            assert str(ended.value.code).startswith(f"InputError: {message}")
            assert "\n" not in str(ended.value.code)


def test_networks_that_cannot_be_had_end_it_with_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_network(timm.create_model("resnet18_025_cifar"), tmp_path)
    for model, message in (
        ("resnet18_025_cifar_decon", "no model or folder 'resnet18_025_cifar_decon'; nearest: "),
        (str(tmp_path), "the first layer of resnet18_025_cifar does not whiten; name a network of deconvolution"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, "--port", "0", "--model", model)
        assert message in str(ended.value.code)
        assert "\n" not in str(ended.value.code)
