"""A stand-in for a server's command line: answers /model_info, has a child and a grandchild of its own, may refuse to start or to end.

    python stand_in.py PORT [die|stubborn|silent]
"""

import http.server
import signal
import subprocess
import sys
import time

port, mode = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
if mode == "die":
    print("RuntimeError: no memory left for the KV cache", flush=True)
    sys.exit(3)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args):
        pass


server = None if mode == "silent" else http.server.HTTPServer(("127.0.0.1", port), Handler)
subprocess.Popen([sys.executable, "-c", "import subprocess,sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"])
if server is None:
    time.sleep(600)
server.serve_forever()
