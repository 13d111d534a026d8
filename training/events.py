"""The command of on_event: it runs beside training, and no failure of it reaches the run."""

import contextlib
import json
import os
import signal
import subprocess
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

from files import print0, printable

TIMEOUT_S = 30.0  # for one call, and at the end until those that still wait are dropped
# of torchrun: a script of ours that the command starts must not join the ranks
RANK_VARIABLES = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'TORCHELASTIC_ERROR_FILE', 'TORCHELASTIC_RUN_ID')


class Hook:
    """Calls a shell command for each event, one at a time and in order."""

    def __init__(self, command: str):
        self.command = command
        self.pool, self.calls = ThreadPoolExecutor(1), deque()  # calls: those that may not have ended

    def send(self, event: str, facts: dict):
        while self.calls and self.calls[0].done():
            self.calls.popleft()
        self.calls.append(self.pool.submit(self.call, event, json.dumps(facts) + '\n'))

    def call(self, event, text):
        """Run the command. Print its output or its failure as one line."""
        try:
            code, output = run(self.command, event, text)
        except Exception as error:  # no process can be started, for example
            code, output = type(error).__name__, str(error)
        output = printable(' '.join(output.split()))[:300]
        if code != 0:
            print0(f'on_event: {event} failed ({code}), training continues: {output}')
        elif output:
            print0(f'on_event: {event}: {output}')

    def close(self):
        """Wait TIMEOUT_S, then drop the waiting calls but the last one. It takes 3 TIMEOUT_S at most."""
        wait(self.calls, TIMEOUT_S)
        n_dropped = sum(call.cancel() for call in list(self.calls)[:-1])
        if n_dropped:
            print0(f'on_event: {n_dropped} events dropped: the run has ended')
        self.pool.shutdown()


def run(command: str, event: str, text: str) -> tuple[int | str, str]:
    """Run `sh -c 'COMMAND "$@"' sh EVENT` with text on its input.

    returns  the exit code or how it ended, and its output
    """
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    # a session of its own: Ctrl-C does not reach it, and all of it can be ended
    process = subprocess.Popen(['sh', '-c', f'{command} "$@"', 'sh', event], env=env, start_new_session=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, encoding='utf-8', errors='replace')
    try:
        output, _ = process.communicate(text, TIMEOUT_S)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f'ended after {TIMEOUT_S:.0f} s', ''
