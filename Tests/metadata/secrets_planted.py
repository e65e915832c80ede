"""Planted secrets: the forms in which they are given, and how they are found in texts."""

import base64
import urllib.parse

# Neither half may appear anywhere, however the text around it is encoded.
LEFT, RIGHT = "Wq8zK4", "vT5nR2"
SECRET = LEFT + RIGHT
# Must be encoded in a URI, in JSON and in an argument of Redis.
SPECIAL = LEFT + '@:/%"\\ é' + RIGHT
QUOTED = urllib.parse.quote(SPECIAL, safe="")

VARIABLES = {
    "MC_METADATA_USERNAME": "user",
    **{name: SECRET for name in (
        "MC_METADATA_PASSWORD", "MC_REDIS_PASSWORD", "MC_METADATA_HTTP_TOKEN",
        # Misspelled, or belonging to other programs.
        "MC_METADATA_PASSWRD", "MC_HTTP_TOKEN_VALUE", "MC_API_KEY")},
}
SPECIAL_VARIABLES = dict(
    VARIABLES, MC_METADATA_PASSWORD=SPECIAL, MC_REDIS_PASSWORD=SPECIAL)


def _base64_traces(text):
    """The digits that a text always has in Base64, whatever precedes and follows it."""
    for shift in range(3):
        encoded = base64.b64encode(b"x" * shift + text.encode() + b"xx").decode()
        yield encoded[-(-shift * 8 // 6):(shift + len(text)) * 8 // 6]


TRACES = [LEFT, RIGHT, *_base64_traces(LEFT), *_base64_traces(RIGHT)]


def found_in(text):
    """The first line that contains part of a secret; None if there is none."""
    for line in text.splitlines():
        if any(trace in line for trace in TRACES):
            return line[:600]
    return None


def uris(port):
    """URIs with secrets, each with the form that messages show; `port` of an existing service."""
    host = f"127.0.0.1:{port}"
    return [
        (f"etcd://user:{SECRET}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://user:{QUOTED}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://user:{SECRET}@{host}?ca=/no/such&cert=/no/such&key=/no/such",
         f"etcd://user:***@{host}?ca=/no/such&cert=/no/such&key=/no/such"),
        (f"redis://:{SECRET}@{host}/1", f"redis://:***@{host}/1"),
        (f"redis://user:{QUOTED}@{host}", f"redis://user:***@{host}"),
        (f"http://user:{SECRET}@{host}/metadata", f"http://user:***@{host}/metadata"),
        (f"http://user:{QUOTED}@{host}/metadata", f"http://user:***@{host}/metadata"),
        (f"https://user:{SECRET}@{host}/metadata", f"https://user:***@{host}/metadata"),
        (f"user:{SECRET}@{host}", f"user:***@{host}"),
        # Malformed.
        (f"etcd://user:{SECRET}", "etcd://user:***"),
        (f"etcd://user:{SECRET}@", "etcd://user:***@"),
        (f"etcd://user:{SECRET}@{host}/path", f"etcd://user:***@{host}/path"),
        (f"etcd://user:{LEFT}/{RIGHT}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://user:{LEFT}@{RIGHT}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://user:{LEFT}:{RIGHT}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://user:{LEFT} {RIGHT}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://user:{LEFT}\n{RIGHT}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://user:{LEFT}%ZZ{RIGHT}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://user:{LEFT}?{RIGHT}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://user:{LEFT}#{RIGHT}@{host}", f"etcd://user:***@{host}"),
        (f"etcd://{host},user:{SECRET}@{host}", ":***@" + host),
        (f"etcd://user:{SECRET}@{host}?password={SECRET}",
         f"etcd://user:***@{host}?password=***"),
        (f"etcd://{host}?password={QUOTED}", f"etcd://{host}?password=***"),
        (f"etcd://{host}?{SECRET}", f"etcd://{host}?***"),
        (f"redis://:{SECRET}@127.0.0.1:99999", "redis://:***@127.0.0.1:99999"),
        (f"redis://:{SECRET}@{host}/abc", f"redis://:***@{host}/abc"),
        (f"redis://:{SECRET}", "redis://:***"),
        (f"rediss://:{SECRET}@{host}", f"rediss://:***@{host}"),
        (f"redis+tls://:{QUOTED}@{host}", f"redis+tls:***@{host}"),
        (f"http://{host}/metadata?token={QUOTED}", f"http://{host}/metadata?token=***"),
        (f"http://{host}/metadata?{SECRET}", f"http://{host}/metadata?***"),
        (f"http://user:{SECRET}@{host}/metadata?token={SECRET}",
         f"http://user:***@{host}/metadata?token=***"),
        (f"http://user:{SECRET}@{host},user:{SECRET}@{host}", "user:***@" + host),
        (f"HTTP://user:{SECRET}@{host}/metadata" + "x" * 5000,
         f"HTTP://user:***@{host}/metadata"),
    ]


# Those of `uris` that reach different kinds of services.
REACHING = (0, 1, 3, 4, 5, 6)
