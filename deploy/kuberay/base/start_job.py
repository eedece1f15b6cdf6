"""Start a job: copy the suspended RayJob NAME to NAME-DAY and let it run. Python's own library, no other image.

The name is the lock: where NAME-DAY is there already, this ends with 0 and starts nothing.
Usage: start_job.py NAME [DAY]
"""

import datetime
import json
import os
import ssl
import sys
import urllib.error
import urllib.request

ACCOUNT = os.environ.get("MEDVISION_ACCOUNT_FOLDER", "/var/run/secrets/kubernetes.io/serviceaccount")
SERVER = os.environ.get("MEDVISION_KUBERNETES", "https://kubernetes.default.svc")


def account(name):
    """A file of the pod's service account."""
    with open(os.path.join(ACCOUNT, name), encoding="utf-8") as file:
        return file.read()


def call(path, body=None):
    """One request to the API server; answers the object."""
    request = urllib.request.Request(  # noqa: S310 - the cluster's own API server
        f"{SERVER}/apis/ray.io/v1/namespaces/{account('namespace')}/rayjobs{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {account('token')}", "Content-Type": "application/json"},
    )
    trusted = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt") if SERVER.startswith("https:") else None
    with urllib.request.urlopen(request, timeout=30, context=trusted) as answer:  # noqa: S310
        return json.load(answer)


def copy_of(template, day):
    """The job of one day; it goes when its template goes."""
    about = template["metadata"]
    return {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {
            "name": f"{about['name']}-{day}",
            "labels": {**about.get("labels", {}), "medvision/day": day},
            "ownerReferences": [
                {"apiVersion": template["apiVersion"], "kind": "RayJob", "name": about["name"], "uid": about["uid"]}
            ],
        },
        "spec": {**template["spec"], "suspend": False},
    }


def main(name, day):
    """Start it; answers the exit code."""
    try:
        created = call("", copy_of(call(f"/{name}"), day))
    except urllib.error.HTTPError as error:
        if error.code == 409:
            print(f"{name}-{day} is there already.")
            return 0
        print(f"The API server answered {error.code}.", file=sys.stderr)
        return 1
    print(f"Started {created['metadata']['name']}.")
    return 0


if __name__ == "__main__":
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else today))
