import os
import socket
from pathlib import Path

import pytest

from moe_runtime.errors import StartError
from moe_runtime.transport.ipc_folder import (
    MAX_IPC_PATH_BYTES,
    default_ipc_folder,
    ipc_path,
    prepare_ipc_folder,
    remove_ipc,
    sweep_ipc,
)


def bind(path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.fsencode(path))
    listener.listen()
    return listener


def test_default_folder_is_the_user_s_own():
    assert str(default_ipc_folder()) == f"/tmp/moe-runtime-{os.geteuid()}"


def test_folder_is_made_for_its_user_alone(ipc_folder):
    folder = ipc_folder / "a" / "b"
    prepare_ipc_folder(folder)
    prepare_ipc_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o701, 0o755])
def test_folder_that_others_can_enter_is_refused(ipc_folder, mode):
    folder = ipc_folder / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StartError, match=f"expected mode 700, found {mode:o}"):
        prepare_ipc_folder(folder)


def test_folder_of_another_user_is_refused(ipc_folder):
    foreign = Path("/proc/1")
    if os.geteuid() == 0:
        os.chown(ipc_folder, 12345, -1)
        foreign = ipc_folder
    with pytest.raises(StartError, match="expected owner"):
        prepare_ipc_folder(foreign)


def test_link_in_place_of_the_folder_is_refused(ipc_folder):
    (ipc_folder / "real").mkdir(mode=0o700)
    (ipc_folder / "link").symlink_to(ipc_folder / "real")
    with pytest.raises(StartError, match="or a link"):
        prepare_ipc_folder(ipc_folder / "link")


def test_file_in_place_of_the_folder_is_refused(ipc_folder):
    (ipc_folder / "file").touch()
    with pytest.raises(StartError, match="cannot be made"):
        prepare_ipc_folder(ipc_folder / "file")


def test_path_names_process_and_incarnation(ipc_folder):
    assert ipc_path(ipc_folder, 0xAB).name == f"{os.getpid()}-00000000000000ab.ipc"


def test_path_that_is_too_long_for_a_socket_is_refused(ipc_folder):
    room = MAX_IPC_PATH_BYTES - len(str(ipc_path(ipc_folder, 1))) - 1
    assert len(str(ipc_path(ipc_folder / ("x" * room), 1))) == MAX_IPC_PATH_BYTES
    with pytest.raises(StartError, match="108 bytes, a Unix socket allows 107"):
        ipc_path(ipc_folder / ("x" * (room + 1)), 1)


def test_sweep_removes_sockets_of_the_dead_and_nothing_else(ipc_folder):
    bind(ipc_folder / "1-dead.ipc").close()
    (ipc_folder / "2-file.ipc").touch()
    (ipc_folder / "notes").touch()
    with bind(ipc_folder / "3-alive.ipc"), bind(ipc_folder / "other-socket"):
        assert sweep_ipc(ipc_folder, min_age_s=-60.0) == 1
    assert {path.name for path in ipc_folder.iterdir()} == {"2-file.ipc", "3-alive.ipc", "notes", "other-socket"}


def test_sweep_leaves_a_socket_that_may_be_in_the_middle_of_its_bind(ipc_folder):
    bind(ipc_folder / "1-young.ipc").close()
    assert sweep_ipc(ipc_folder, min_age_s=60.0) == 0
    os.utime(ipc_folder / "1-young.ipc", (0, 0))
    assert sweep_ipc(ipc_folder, min_age_s=60.0) == 1


def test_the_socket_of_one_dead_process_is_removed_however_young_and_no_other(ipc_folder):
    bind(ipc_folder / "dead.ipc").close()
    bind(ipc_folder / "other.ipc").close()
    remove_ipc(f"ipc://{ipc_folder / 'dead.ipc'}")
    remove_ipc(f"ipc://{ipc_folder / 'dead.ipc'}")
    assert [path.name for path in ipc_folder.iterdir()] == ["other.ipc"]


def test_sweep_of_a_folder_that_is_not_there_removes_nothing(ipc_folder):
    assert sweep_ipc(ipc_folder / "never") == 0
