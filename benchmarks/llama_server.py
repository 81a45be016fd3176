"""llama.cpp's own HTTP server out of the `xllamacpp` wheel, for hosts without a built `llama-server`.

    python benchmarks/llama_server.py -m MODEL.gguf --host 127.0.0.1 --port 8106 -c 131072 -np 16 -cb

takes those of `llama-server`'s options that `servers.py` gives it, and runs until it is told to stop.
"""

import argparse
import signal


def main() -> None:
    """Serve until a signal ends the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", dest="model", required=True, metavar="MODEL.gguf")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("-c", dest="context", type=int, required=True, help="tokens of all slots together")
    parser.add_argument("-np", dest="slots", type=int, required=True, help="requests in flight")
    parser.add_argument("-cb", action="store_true", help="continuous batching")
    options = parser.parse_args()
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_gpu_layers = options.model, 0
    settings.hostnames, settings.port = [options.host], options.port
    settings.n_ctx, settings.n_parallel, settings.cont_batching = options.context, options.slots, options.cb
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
