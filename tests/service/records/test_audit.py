import asyncio
import errno
import json
import logging

import pytest

from service.config import AuditConfig
from service.errors import ConfigError
from service.records.audit import AuditLog


class Disk:
    """`os.write` with a limit: what fits is written, then there is no space left."""

    def __init__(self, room):
        self.room = room
        self.content = b""

    def __call__(self, _descriptor, content):
        fits = content[: self.room]
        if content and not fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(fits)
        self.content += fits
        return len(fits)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def numbers_in(content):
    return [json.loads(line)["n"] for line in content.splitlines()]


async def write_all(log, numbers):
    await asyncio.gather(*(log.write(lambda n=n: {"n": n}) for n in numbers))


async def test_a_record_is_in_the_file_when_the_write_returns(path):
    outcomes = []
    log = AuditLog(AuditConfig(file=str(path)), outcomes.append)
    for n in range(3):
        await log.write(lambda n=n: {"n": n})
        assert numbers_in(path.read_bytes())[-1] == n
    log.close()
    assert outcomes == ["written"] * 3
    assert path.stat().st_mode & 0o077 == 0


async def test_many_at_once_are_all_there_in_order(path):
    log = AuditLog(AuditConfig(file=str(path)))
    await write_all(log, range(1000))
    log.close()
    assert numbers_in(path.read_bytes()) == list(range(1000))


async def test_a_file_from_before_is_gone_on_with_and_a_torn_line_stays_alone(path):
    path.write_bytes(b'{"n":0}\n{"n":')
    log = AuditLog(AuditConfig(file=str(path)))
    await log.write(lambda: {"n": 1})
    log.close()
    assert path.read_bytes() == b'{"n":0}\n{"n":\n{"n":1}\n'


async def test_full_files_are_put_aside_under_growing_numbers_and_the_oldest_are_removed(path):
    log = AuditLog(AuditConfig(file=str(path), max_bytes=4096, keep_files=3))
    await write_all(log, range(5000))
    log.close()
    aside = sorted(path.parent.glob("audit.jsonl.*"))
    assert len(aside) == 3
    assert all(file.stat().st_size <= 4096 for file in [path, *aside])
    kept = [number for file in [*aside, path] for number in numbers_in(file.read_bytes())]
    assert kept == list(range(kept[0], 5000))


async def test_a_full_disk_fails_no_call_is_counted_and_told_once_and_writing_goes_on_when_there_is_room(path, caplog):
    outcomes, disk = [], Disk(room=20)
    log = AuditLog(AuditConfig(file=str(path)), outcomes.append, write=disk)
    with caplog.at_level(logging.ERROR):
        for n in range(5):
            await log.write(lambda n=n: {"n": n})
    assert (outcomes.count("written"), outcomes.count("lost")) == (2, 3)
    assert [record.message for record in caplog.records] == [
        f"audit log {path}: records are lost: No space left on device"
    ]
    disk.room = 1000
    await log.write(lambda: {"n": 9})
    log.close()
    assert disk.content == b'{"n":0}\n{"n":1}\n{"n"\n{"n":9}\n'


async def test_a_record_that_cannot_be_made_is_lost_and_the_next_one_is_written(path):
    outcomes = []
    log = AuditLog(AuditConfig(file=str(path)), outcomes.append)
    await log.write(lambda: {"n": object()})
    await log.write(lambda: {"n": 1})
    log.close()
    assert outcomes == ["lost", "written"]


async def test_a_disk_that_hangs_holds_an_answer_up_no_longer_than_allowed(path):
    hang, outcomes = asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def slow(_descriptor, content):
        asyncio.run_coroutine_threadsafe(hang.wait(), loop).result()
        return len(content)

    log = AuditLog(AuditConfig(file=str(path), wait_seconds=0.02), outcomes.append, write=slow)
    await log.write(lambda: {"n": 1})
    assert outcomes == ["late"]
    hang.set()
    await asyncio.sleep(0.05)
    log.close()
    assert outcomes == ["late", "written"]


async def test_what_waits_for_a_slow_disk_is_bounded_in_bytes(path):
    hang, outcomes = asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def slow(_descriptor, content):
        asyncio.run_coroutine_threadsafe(hang.wait(), loop).result()
        return len(content)

    log = AuditLog(AuditConfig(file=str(path), wait_seconds=0.0), outcomes.append, write=slow)
    for n in range(5):
        await log.write(lambda n=n: {"n": n}, 20 * 1024 * 1024)
    assert outcomes.count("lost") == 2
    hang.set()
    await asyncio.sleep(0.05)
    log.close()


async def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected an audit_file that can be written, got"):
        AuditLog(AuditConfig(file=str(tmp_path / "file" / "audit.jsonl")))
