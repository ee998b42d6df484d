"""A locustfile as anyone would write it: HttpUser, requests' streaming, a time per line, JSON parsed as it comes.

    locust -f locustfile.py --headless -u 128 -r 128 -t 20s -H URL

MODEL, OUTPUT_TOKENS and RESULT come from the environment; RESULT gets a JSON line per reply at the end of the run.
"""

import json
import os
import time
import uuid
from itertools import pairwise
from pathlib import Path

from locust import HttpUser, constant, events, task

REPLIES: list[dict[str, object]] = []


class LlmUser(HttpUser):
    """Sends one completion after another."""

    wait_time = constant(0)

    @task
    def complete(self) -> None:
        """Stream one reply."""
        request_id = str(uuid.uuid4())
        body = {
            "model": os.environ["MODEL"],
            "prompt": "hello world " * 16,
            "max_tokens": int(os.environ["OUTPUT_TOKENS"]),
            "stream": True,
            "ignore_eos": True,
        }
        stamps = []
        start = time.perf_counter()
        headers = {"X-Request-ID": request_id}
        response = self.client.post("/v1/completions", json=body, headers=headers, stream=True)
        for line in response.iter_lines():
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["text"]:
                stamps.append(time.perf_counter())
        if stamps:
            gaps = [after - before for before, after in pairwise(stamps)]
            REPLIES.append({"id": request_id, "ttft": stamps[0] - start, "itls": gaps})


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def write(**_: object) -> None:
    """Save what was measured."""
    with Path(os.environ["RESULT"]).open("w") as result:
        result.writelines(json.dumps(reply) + "\n" for reply in REPLIES)
