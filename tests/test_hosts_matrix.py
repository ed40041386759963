"""docs/hosts.md: each host on every system, held to an independent oracle, or refused. `make hosts` writes the page."""

import socket

import hosts_table
import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a host asks the network for {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.filterwarnings("ignore")  # the models' own
@pytest.mark.parametrize("name", hosts_table.HOSTS)
def test_host(name):
    state = hosts_table.read()
    found = hosts_table.row(hosts_table.HOSTS[name])
    if state["versions"] == hosts_table.VERSIONS:
        assert hosts_table.settled(found) == hosts_table.settled(state["rows"][name]), "run make hosts"


def test_the_page_is_of_every_host_and_of_what_was_found():
    state = hosts_table.read()
    assert state["rows"].keys() == hosts_table.HOSTS.keys()
    assert hosts_table.PAGE.read_text() == hosts_table.page(state), "run make hosts"
    libraries = [host.library for host in hosts_table.HOSTS.values()]
    assert libraries.count("timm") >= 120
    assert libraries.count("transformers") >= 40
