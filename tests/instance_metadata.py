"""A local server that answers as EC2's instance metadata service does, in its second version."""

import http.server
import threading
from datetime import UTC, datetime, timedelta

ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


class Service:
    """IMDSv2: a token by PUT, everything else only with it; 404 where there is nothing to say."""

    def __init__(self):
        self.says, self.tokens, self.asked = {}, set(), []
        self.refusals = []
        """Statuses that the next questions for a token are answered with."""
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, status, text=""):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def do_PUT(self):
                if self.path != "/latest/api/token" or not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
                    return self.answer(400)
                if service.refusals:
                    return self.answer(service.refusals.pop(0))
                service.tokens.add(f"token{len(service.asked)}")
                return self.answer(200, f"token{len(service.asked)}")

            def do_GET(self):
                service.asked.append(self.path)
                if self.headers.get("X-aws-ec2-metadata-token") not in service.tokens:
                    return self.answer(401)
                return self.answer(200, service.says[self.path]) if self.path in service.says else self.answer(404)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def announces(self, seconds, action="terminate"):
        at = datetime.now(UTC) + timedelta(seconds=seconds)
        self.says[ACTION] = f'{{"action": "{action}", "time": "{at:%Y-%m-%dT%H:%M:%SZ}"}}'

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
