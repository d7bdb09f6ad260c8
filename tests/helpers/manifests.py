"Change the manifest of a cache as its writer would write it: with the checksum of its entries."

import hashlib, json
from pathlib import Path


def signed(entries):
    "The entries with their checksum: blake2b, 128 bits, of all other entries as compact JSON"
    entries = {k: v for k, v in entries.items() if k != 'checksum'}
    digest = hashlib.blake2b(json.dumps(entries).encode(), digest_size=16)
    return entries | dict(checksum=digest.hexdigest())


def write_manifest(folder, entries):
    (Path(folder) / 'manifest.json').write_text(json.dumps(signed(entries)))
