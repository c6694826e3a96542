"""API keys in SQL: what is kept, who gets in, and who does not."""

import multiprocessing
import random
import secrets
import time
from pathlib import Path

import pytest

from cluster.api_keys import (
    MAX_KEY_BYTES,
    check_address,
    create_key,
    find_key,
    has_keys,
    is_loopback,
    key_id,
    keys_state,
    list_keys,
    opened_keys,
    revoke_key,
    temporary_key,
)
from cluster.errors import ConfigError


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/champions.db"


def by_id(engine):
    return {key.id: key for key in list_keys(engine)}


def test_key_is_found_and_only_its_hash_is_kept(database, tmp_path):
    with opened_keys(database) as engine:
        made, text = create_key(engine, "alice", models=("tiny",), requests_per_minute=60, tokens_per_minute=1000)
        found = find_key(by_id(engine), text.encode())
    assert found == made
    assert (found.name, found.models, found.requests_per_minute) == ("alice", ("tiny",), 60)
    assert text.startswith(f"rs-{made.id}-")
    assert len(text) == 57
    assert key_id(text.encode()) == made.id
    stored = (tmp_path / "champions.db").read_bytes()
    secret = text.removeprefix(f"rs-{made.id}-")
    assert made.id.encode() in stored
    assert secret.encode() not in stored
    assert secret not in repr(found)


def test_ten_thousand_guesses_find_no_key(database):
    chance = random.Random(0)
    with opened_keys(database) as engine:
        real = [create_key(engine, f"k{number}")[1] for number in range(20)]
        keys = by_id(engine)
    assert all(find_key(keys, text.encode()) for text in real)

    def guess(number):
        text = chance.choice(real)
        at = chance.randrange(14, len(text))
        return [
            f"rs-{secrets.token_hex(5)}-{secrets.token_urlsafe(32)}",  # the right form
            text[:14] + secrets.token_urlsafe(32),  # a real id
            text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :],  # one letter of a real one
            text[:at],  # the beginning
            text[:14] + chance.choice(real)[14:-1] + "~",
        ][number % 5].encode()

    found = [find_key(keys, wrong) for wrong in (guess(number) for number in range(10_000)) if wrong not in real]
    assert found == [None] * 10_000


@pytest.mark.parametrize(
    "presented",
    [
        b"",
        b"rs-",
        b"rs--",
        b"\0",
        b"' OR '1'='1",
        b"rs-aaaaaaaaaa-' UNION SELECT sha256 FROM raystill_api_keys --",
        b"%27%20OR%201=1",
        b"key\r\nx-admin: yes",
        b"\xff\xfe",
        "rs-ａaaaaaaaaa".encode(),
        b"Bearer rs-aaaaaaaaaa",
        b"A" * 100_000,
    ],
)
def test_what_is_no_key_finds_none(database, presented):
    with opened_keys(database) as engine:
        _, text = create_key(engine, "alice")
        keys = by_id(engine)
    key = text.encode()
    for wrong in (presented, key + presented if presented else b"", presented + key if presented else b""):
        assert find_key(keys, wrong) is None
    assert find_key(keys, key)


def test_key_of_more_than_200_bytes_is_not_read_further(database):
    with opened_keys(database) as engine:
        _, text = create_key(engine, "alice")
        padded = text.encode() + b"x" * (MAX_KEY_BYTES + 1 - len(text))
        assert len(padded) == MAX_KEY_BYTES + 1
        assert key_id(padded) is None
        assert find_key(by_id(engine), padded) is None


def test_states_follow_revocation_and_expiry(database):
    with opened_keys(database) as engine:
        stays, _ = create_key(engine, "stays")
        ends, _ = create_key(engine, "ends", lifetime_s=60)
        before = keys_state(engine)
        assert revoke_key(engine, "stays").state(time.time()) == "revoked"
        assert keys_state(engine) != before
        revoked_at = by_id(engine)[stays.id].revoked_at
        assert revoke_key(engine, f"rs-{stays.id}").revoked_at == revoked_at
    assert ends.state(ends.created_at + 59) == "active"
    assert ends.state(ends.created_at + 60) == "expired"


def test_revoke_takes_id_name_or_key_and_refuses_what_is_not_one_key(database):
    with opened_keys(database) as engine:
        _, text = create_key(engine, "once")
        create_key(engine, "twice")
        second, _ = create_key(engine, "twice")
        assert revoke_key(engine, text).name == "once"
        with pytest.raises(ConfigError, match="2 keys have this name: give an id"):
            revoke_key(engine, "twice")
        assert revoke_key(engine, second.id).revoked_at is not None
        with pytest.raises(ConfigError, match="no such id or name"):
            revoke_key(engine, "' OR 1=1 --")
        wrong = text[:-1] + ("A" if text[-1] != "A" else "B")
        assert revoke_key(engine, wrong).name == "once"  # the id alone decides what is revoked
        assert [key.revoked_at is None for key in list_keys(engine)] == [False, True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "1 to 100 printable"),
        ({"name": "x\ny"}, "1 to 100 printable"),
        ({"name": "x" * 101}, "1 to 100 printable"),
        ({"models": ("../x",)}, "model name"),
        ({"requests_per_minute": 0}, "requests per minute 0"),
        ({"tokens_per_minute": 2**31}, "tokens per minute"),
        ({"lifetime_s": 0.0}, "above 0"),
    ],
)
def test_values_that_cannot_be_are_refused(database, fields, message):
    with opened_keys(database) as engine, pytest.raises(ConfigError, match=message):
        create_key(engine, **{"name": "alice", **fields})


def test_temporary_key_works_in_the_block_only_and_only_if_keys_are_asked_for(database):
    with temporary_key(database, "run", "tiny", 60) as text:
        assert text is None
    with opened_keys(database) as engine:
        create_key(engine, "alice")
        before = keys_state(engine)
        with temporary_key(database, "run", "tiny", 60) as text:
            found = find_key(by_id(engine), text.encode())
            assert found.models == ("tiny",)
            assert found.expires_at - found.created_at == 60
        assert find_key(by_id(engine), text.encode()) is None
        create_key(engine, "bob")
        assert keys_state(engine) != before
        assert len({key.id for key in list_keys(engine)}) == 2


def test_numbers_are_not_used_again(database):
    with opened_keys(database) as engine:
        create_key(engine, "alice")
        states = set()
        for _ in range(3):
            with temporary_key(database, "run", "tiny", 60):
                states.add(keys_state(engine))
        assert len(states) == 3


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_public_address_needs_a_key(database, host, loopback):
    assert is_loopback(host) == loopback
    if loopback:
        check_address(host, database)
    else:
        with pytest.raises(ConfigError, match=r"no API key: make one with `raystill keys create CONFIG`"):
            check_address(host, database)
    assert not has_keys(database)
    with opened_keys(database) as engine:
        create_key(engine, "alice")
    check_address(host, database)


def _make(database, start, done):
    start.wait(60)
    with opened_keys(database) as engine:
        create_key(engine, "alice")
    done.put(True)


def test_processes_that_start_at_once_make_one_table(database):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cluster.api_keys"])
    start, done = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_make, args=(database, start, done)) for _ in range(6)]
    for process in processes:
        process.start()
    assert [done.get(timeout=120) for _ in processes] == [True] * 6
    for process in processes:
        process.join(60)
    with opened_keys(database) as engine:
        assert len(list_keys(engine)) == 6
