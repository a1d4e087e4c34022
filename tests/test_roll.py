# SPDX-License-Identifier: Apache-2.0
"""The roll: what processes are told, at once or when the wait for the missing is over."""

import json
import re
import socket
import threading
import time

import pytest

from lmjax.drill_runs import free_port
from lmjax.hosts import join
from lmjax.roll import Place, call_the_roll


def told(*places: tuple[int, int], seconds: float = 30) -> list[str]:
    """What processes (index, count) are told that start in this order: nothing, or an error."""
    address, said = f"127.0.0.1:{free_port()}", [""] * len(places)

    def one(number: int, index: int, count: int) -> None:
        try:
            call_the_roll(Place(address, count, index), seconds)
        except ValueError as error:
            said[number] = str(error)

    threads = [
        threading.Thread(target=one, args=(number, *place)) for number, place in enumerate(places)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    return said


def test_two_processes_of_one_number_are_told_at_once():
    began = time.monotonic()
    said = told((0, 3), (1, 3), (1, 3))
    host = socket.gethostname()
    assert set(said) == {f"two processes say --process=1 ({host}, {host})"}
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("counts", [(2, 3), (3, 2)])
def test_processes_that_were_told_of_other_numbers_are_told_at_once(counts):
    first, second = counts
    began = time.monotonic()
    said = told((0, first), (1, second))
    assert set(said) == {f"process 1 was told of {second} processes, process 0 of {first}"}
    assert time.monotonic() - began < 10


def test_a_process_that_is_started_again_while_it_waits_is_no_second_one():
    place = Place(f"127.0.0.1:{free_port()}", 3, 0)
    said: list[str] = []

    def first() -> None:
        try:
            call_the_roll(place, 20)
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", int(place.address.split(":")[1]))) as killed:
        killed.sendall(json.dumps({"index": 1, "count": 3, "host": "x"}).encode() + b"\n")
        time.sleep(0.3)
    others = [
        threading.Thread(target=call_the_roll, args=(Place(place.address, 3, index), 20))
        for index in (2, 1)  # with the second all would be there, but for the one that ended
    ]
    for other in others:
        other.start()
        time.sleep(0.3)
    for other in (*others, thread):
        other.join()
    assert said == []


def test_who_waited_in_vain_is_told_how_to_wait_longer():
    for said in told((0, 3), (1, 3), seconds=1):
        assert said.endswith("(LMJAX_JOIN_SECONDS is how long to wait)") and "missing: 2" in said
    (said,) = told((1, 2), seconds=0.5)
    assert said.endswith("is it started? (LMJAX_JOIN_SECONDS is how long to wait)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("127.0.0.1:99999", "2", "0"), "--coordinator=127.0.0.1:99999: a port is from 1 to 65535"),
        (("127.0.0.1:0", "2", "1"), "--coordinator=127.0.0.1:0: a port is from 1 to 65535"),
        (("127.0.0.1:" + 5000 * "9", "2", "1"), "a port is from 1 to 65535"),
        (("127.0.0.1:²", "2", "1"), "HOST:PORT is needed"),
        ((":80", "2", "1"), "--coordinator=:80: HOST:PORT is needed"),
        (("h:1", "0", "0"), "--processes=0: must be at least 1"),
        (("h:1", "-2", "0"), "--processes=-2: must be at least 1"),
        (("h:1", "2", "2"), "--process=2: from 0 to 1 (--processes=2)"),
        (("h:1", "two", "1"), "--processes='two': a whole number is needed"),
        ((None, None, "7"), "--process=7: from 0 to 3 (LMJAX_PROCESSES=4)"),
    ],
)
def test_what_cannot_be_is_named_as_it_was_typed(flags, message):
    env = {"LMJAX_COORDINATOR": "h:1", "LMJAX_PROCESSES": "4"}
    with pytest.raises(ValueError, match=re.escape(message)):
        join(env, flags)


def test_the_roll_is_complete_in_any_order():
    assert told((3, 4), (1, 4), (0, 4), (2, 4), seconds=20) == [""] * 4


def test_who_is_missing_is_said_to_all_who_came():
    first, third = told((0, 4), (2, 4), seconds=1)
    assert "2 of 4 processes started within 1 s; missing: 1, 3; here: 0 (" in first
    assert "2 of 4 processes started within 1 s; missing: 1, 3" in third


def test_a_first_process_that_is_not_there_is_named_with_its_address():
    (said,) = told((1, 2), seconds=0.5)
    assert re.search(r"process 1 of 2 waited 0.5 s for process 0 at 127\.0\.0\.1:\d+", said)


def test_strangers_at_the_port_are_no_process_of_the_run():
    place = Place(f"127.0.0.1:{free_port()}", 2, 0)

    def stranger() -> None:
        time.sleep(0.3)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"index": 0, "count": 2}\n', b"[" * 4000):
            with socket.create_connection(("127.0.0.1", int(place.address.split(":")[1]))) as s:
                s.sendall(said)

    thread = threading.Thread(target=stranger)
    thread.start()
    with pytest.raises(ValueError, match="missing: 1"):
        call_the_roll(place, 1.5)
    thread.join()
