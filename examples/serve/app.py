"""A model behind Ray Serve: two ingress replicas over one named cluster, whose engines belong to neither.

rayk example-model /tmp/tiny
pip install 'ray[serve]' 'rayk[server]'
ray start --head
python examples/serve/app.py /tmp/tiny    # starts the cluster "prod" and leaves it
serve run examples/serve/config.yaml      # http://127.0.0.1:8000/v1
rayk down prod                            # when it is no longer needed
"""

import os
import sys

import rayk
from rayk.server import deployment

NAME = "prod"


def cluster() -> rayk.Cluster:
    """In each ingress replica. With RAYK_MODEL the first one starts it (examples/multinode/rayservice.yaml)."""
    if (model := os.environ.get("RAYK_MODEL")) is None:
        return rayk.attach(NAME)
    session = rayk.InferenceSession("ray", name=NAME)
    return rayk.Cluster(model, session, replicas=int(os.environ.get("RAYK_REPLICAS", "2")))


app = deployment(cluster, ["tiny"], settings={"tool_parser": "hermes"}, ray_actor_options={"num_cpus": 0.1})

if __name__ == "__main__":
    with rayk.InferenceSession("ray", "auto", NAME) as session:
        rayk.Cluster(sys.argv[1], session, replicas=2, pages=256)
        print(f"the cluster {NAME!r} is ready")
