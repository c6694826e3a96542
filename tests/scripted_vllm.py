"""Stands where `vllm_script.py` stands, and speaks its protocol: answers repeat the prompt's tokens without end.

SCRIPT in the environment says how it starts: `ready`, `never`, `fails`, `few` (outputs), `nan`. The first token of a
prompt says what becomes of the answer (`REFUSE`, …).
"""

import json
import os
import signal
import sys
import threading
import time

REFUSE, DIE, HANG, NAN, EARLY, NOTHING = range(2, 8)
STEP_S = 0.005
cancelled: set[int] = set()
lock = threading.Lock()


def say(message: dict) -> None:
    with lock:
        print(json.dumps(message), flush=True)


def row(token_id: int, asked: dict) -> list:
    return [-0.5, [[token_id + number, -0.5 - number] for number in range(asked["logprobs"])]]


def answer(asked: dict) -> None:
    number, prompt = asked["id"], asked["token_ids"]
    if prompt[0] == REFUSE:
        say({"id": number, "refused": "ValueError: no"})
        return
    if prompt[0] == NOTHING:
        say({"id": number, "token_ids": [], "logprobs": [], "finished": "abort"})
        return
    for count in range(asked["max_tokens"]):
        time.sleep(STEP_S)
        if number in cancelled:
            return
        token_id = prompt[count % len(prompt)]
        said = {"id": number, "token_ids": [token_id], "logprobs": [row(token_id, asked)], "finished": None}
        if count == 0 and asked["prompt_logprobs"] is not None:
            said["prompt_logprobs"] = [row(token_id, asked) for token_id in prompt[1:]]
        if prompt[0] == NAN:
            said["logprobs"][0][0] = float("nan")
        if count + 1 == asked["max_tokens"] or prompt[0] == EARLY:
            said["finished"] = "length" if prompt[0] != EARLY else "abort"
        say(said)
        if said["finished"] or prompt[0] == HANG:
            return
        if prompt[0] == DIE:
            print("OSError: the device is gone", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    script = os.environ.get("SCRIPT", "ready")
    if script == "fails":
        print("(Worker) ERROR [x.py:3] RuntimeError: out of memory", file=sys.stderr)
        print("RuntimeError: it is over", file=sys.stderr, flush=True)
        say({"failed": "RuntimeError: Engine core initialization failed. See root cause above."})
        os._exit(1)
    settings = json.loads(sys.argv[1])
    if script != "never":
        outputs = settings["vocabulary"] - (3 if script == "few" else 0)
        say({"ready": {"outputs": outputs, "logprob": float("nan") if script == "nan" else -1.0}})
    for line in sys.stdin:
        asked = json.loads(line)
        if "cancel" in asked:
            cancelled.add(asked["id"])
        else:
            threading.Thread(target=answer, args=(asked,), daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()
