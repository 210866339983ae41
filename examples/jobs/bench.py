"""Submit a load test as a Ray job, follow its log, and bring its report here.

    pip install 'ray[default]'
    export RAY_API_SERVER_ADDRESS=http://HEAD:8265
    export RAY_AUTH_MODE=token                    # if the cluster asks for one; it is read from ~/.ray/auth_token, or
    export RAY_AUTH_TOKEN=..                      # from here
    python examples/jobs/bench.py --workload chat --requests 2000 --replicas 3

What follows the name is handed to `rayk bench`. This checkout is shipped; the nodes need what rayk depends on. The exit
code is 0 when the job succeeded, else 1; Ctrl-C stops the job, and what it did until then is reported.
"""

import asyncio
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient

CHECKOUT = Path(__file__).resolve().parent.parent.parent
RESULT = '{"command":"bench"'


def submit(client: JobSubmissionClient, arguments: list[str]) -> str:
    """The job's id. A cluster that has just been started may have nobody yet who runs jobs: waits for that."""
    entrypoint = shlex.join(["python", "-m", "rayk", "bench", *arguments, "--out", "-"])
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(CHECKOUT)})
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


async def follow(client: JobSubmissionClient, job: str) -> None:
    """Print the log until the job ends, without the line that holds the result."""
    rest = ""
    async for part in client.tail_job_logs(job):
        *lines, rest = (rest + part).split("\n")
        print(*(f"{line}\n" for line in lines if not line.startswith(RESULT)), sep="", end="", flush=True)


def end(client: JobSubmissionClient, job: str) -> bool:
    """Whether it succeeded, once it has ended."""
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.2)
    print(f"job {job}: {status.lower()}")
    return status == "SUCCEEDED"


def main(arguments: list[str]) -> int:
    logging.getLogger("ray").setLevel(logging.WARNING)  # not each file that is not shipped
    try:
        client = JobSubmissionClient(os.environ.get("RAY_API_SERVER_ADDRESS"))
        job = submit(client, arguments)
    except (ConnectionError, RuntimeError, RayError) as error:
        print(f"the job was not submitted: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    try:
        asyncio.run(follow(client, job))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        client.stop_job(job)
    succeeded = end(client, job)
    if RESULT in (log := client.get_job_logs(job)):
        rayk = [sys.executable, "-m", "rayk", "report", "-", "--out", job]
        subprocess.run(rayk, input=log.encode(), check=True, stdout=subprocess.DEVNULL)
        print(f"report: {job}/report.html")
    return 0 if succeeded else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
