import socket
import zlib

import pytest

from service.server import running_server
from tests.service.conftest import QUICK
from tests.service.fakes import FakeDetector, request_for
from torture import frames


def test_a_frame_is_length_kind_flags_stream_and_payload():
    assert frames.frame(1, 4, 3, b"abc") == b"\x00\x00\x03\x01\x04\x00\x00\x00\x03abc"


def test_data_is_cut_and_only_the_last_frame_ends_the_call():
    sent = list(frames.data(1, bytes(40_000)))
    assert [len(one) - 9 for one in sent] == [16_384, 16_384, 7_232]
    assert [one[4] for one in sent] == [0, 0, 1]


@pytest.mark.parametrize("megabytes", [2, 70])
def test_a_bomb_grows_a_thousandfold(megabytes):
    packed = frames.gzip_of_zeros(megabytes)
    grown = zlib.decompressobj(31).decompress(packed, 66 << 20)
    assert len(packed) < len(grown) / 900
    assert len(grown) == min(megabytes, 66) << 20
    assert not any(grown)


def test_a_call_by_hand_is_answered_like_any_other():
    with running_server(FakeDetector(), QUICK) as target, frames.connect(target) as connection:
        body = frames.message(request_for(*range(20)).SerializeToString())
        said = frames.exchange(connection, frames.headers(1), body)
        assert b"grpc-status\x010" in said
        assert b"shoe" in said


def test_a_bomb_is_refused_by_the_server():
    with running_server(FakeDetector(), QUICK) as target, frames.connect(target) as connection:
        body = frames.message(frames.gzip_of_zeros(8), compressed=True)
        said = frames.exchange(connection, frames.headers(1, encoding="gzip"), body)
        assert b"larger than max" in said


def test_an_aborted_connection_is_reset():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = frames.connect(f"127.0.0.1:{listener.getsockname()[1]}")
        other, _ = listener.accept()
        frames.abort(connection)
        with other, pytest.raises(ConnectionResetError):
            other.recv(1)
