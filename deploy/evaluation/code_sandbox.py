"""Runs one program that a model wrote, as a process of its own; see code_execution.py, which starts this file.

Before the program runs, the process gives up what it can: the network (in a network namespace of its own), root's
rights (it becomes nobody, who may read everything, since Python may lie in root's home, and write nothing), and all but
a little memory, processor time, files and file size. It imports nothing of the project, so that it starts in 20 ms.
"""

import ctypes
import json
import os
import resource
import sys

NOBODY = 65534
_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # of sched.h
_KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES = 8, 38  # of prctl.h
_CAPABILITY_VERSION, _READ_ALL = 0x20080522, 1 << 2  # of capability.h; CAP_DAC_READ_SEARCH
_FILE_BYTES, _FILES, _PROCESSES = 16 * 2**20, 64, 256


def without_network() -> bool:
    """Leave the machine's network, as root or in a user namespace of one's own; False where the kernel refuses both."""
    libc = ctypes.CDLL(None)
    if libc.unshare(_NEW_NETWORK) == 0:
        return True
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_USER | _NEW_NETWORK) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def give_up_rights(become_nobody: bool, memory_bytes: int, seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_NOFILE: _FILES,
        resource.RLIMIT_CORE: 0,
    }
    libc = ctypes.CDLL(None)
    if become_nobody:
        limits[resource.RLIMIT_NPROC] = _PROCESSES  # counted for the user, who is nobody else
        libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
        libc.capset(header, (ctypes.c_uint32 * 6)(_READ_ALL, _READ_ALL, 0, 0, 0, 0))  # effective, permitted
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def main() -> None:
    order = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    network_off = without_network()
    give_up_rights(order["become_nobody"], order["memory_bytes"], order["seconds"])
    program, mark = order.pop("program"), order.pop("mark")
    error = ""
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as raised:
        error = type(raised).__name__
    json.dump({"mark": mark, "error": error, "network_off": network_off}, answers)
    answers.flush()
    os._exit(0)  # threads of the program are not waited for


if __name__ == "__main__":
    main()
