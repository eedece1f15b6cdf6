"""What `medvision serve` is configured by: the model, the address, the limits, and how far it scales."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medvision_ray.config.operations import LoggingConfig
from medvision_ray.config.sections import DecodeConfig, Positive, PrivacyConfig, RayConfig, Section

Seconds = Annotated[float, Field(gt=0, le=3600)]


class HttpConfig(Section):
    """Where the server listens, and to whom it answers."""

    host: str = "127.0.0.1"
    """Address to listen on; beyond this machine's own (loopback) only with a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 lets the system choose, where Ray is started here."""
    token_env: str = "MEDVISION_SERVE_TOKEN"  # noqa: S105 - a variable's name
    """Environment variable that holds the bearer token, at least 16 characters; needed beyond loopback."""
    token_file: str | None = None
    """Local file that holds the token; wins over `token_env`."""
    tls_certificate: str | None = None
    """PEM file of the server's certificate and its chain; needs `tls_key`."""
    tls_key: str | None = None
    """PEM file of the certificate's private key."""
    allow_http: bool = False
    """Listen beyond loopback without TLS, for a proxy that ends TLS in front; images and token are readable on the way to it."""
    ingress: Literal["proxy", "haproxy"] = "proxy"
    """What takes requests to replicas: Ray Serve's `proxy`, or `haproxy`, some 7 ms faster an answer, without TLS (docs/serving.md)."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that requests may name; empty takes any with a token, and only this machine's without one (DNS rebinding)."""

    @model_validator(mode="after")
    def _consistent(self) -> HttpConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("`tls_certificate` and `tls_key` go together")
        if self.ingress == "haproxy" and (self.tls_certificate is not None or self.port == 0):
            raise ValueError(
                "`ingress: haproxy` speaks no TLS and needs a port: leave `tls_certificate` and `tls_key` out (with "
                "`allow_http: true` where a proxy in front ends TLS) and give `port`"
            )
        if not self.on_loopback and self.tls_certificate is None and not self.allow_http:
            raise ValueError(
                "`host` is beyond loopback: give `tls_certificate` and `tls_key`, or `allow_http: true` "
                "where a proxy in front ends TLS"
            )
        return self

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class RequestLimits(Section):
    """What one request may cost, and how many a replica takes; pixels, frames and bytes are limited by `decode`."""

    max_in_flight: Positive = 16
    """Requests that a replica works on or holds at once; more are answered 429 with Retry-After. Twice the batch on a GPU."""
    expected_seconds: Seconds | None = 1.5
    """Seconds that an answer may be expected to take, by requests in flight and their pace; beyond it 429. Null: `max_in_flight` alone."""
    max_body_bytes_in_flight: Positive = 1 << 30
    """Bytes of bodies that a replica holds at once; more are answered 429."""
    body_seconds: Seconds = 60.0
    """Longest time for a body to arrive (408)."""
    answer_seconds: Seconds = 60.0
    """Longest time from the whole body to the answer (504)."""


class ServingDecodeConfig(DecodeConfig):
    """Decoder limits of one request. Every object is decoded in a child process, whatever `isolation` says."""

    max_bytes: Positive = 256 << 20
    """Largest body in bytes (413); counted while it arrives."""
    max_frames: Positive = 1024
    """Most frames or slices in one object (`too_large`)."""
    max_decoded_bytes: Positive = 1 << 30
    """Most bytes that an object may decode or decompress to (`too_large`, `decompression_bomb`)."""
    max_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest time for decoding and preparing one object (`timeout`)."""
    max_memory_bytes: Positive = 3 << 30
    """Memory that a decoding process may take above what it starts with (`out_of_memory`)."""


class ScaleConfig(Section):
    """How many processes answer, and what each takes. A replica decodes in processes of its own and predicts by itself."""

    min_replicas: Positive = 1
    """Replicas that are always there."""
    max_replicas: Positive = 1
    """Most replicas; Ray Serve adds and removes them by the requests under way."""
    target_load: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Load of a replica at which Ray Serve is content, of 1 where it begins to refuse; above it adds a replica, below it removes one."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that a replica reserves."""
    threads: Positive = 1
    """CPU threads of the network; give it as many `cpus`. More answer single objects sooner, but can round otherwise than the batch job."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs that a replica reserves; null is 1 where the cluster has any, else 0. Give it more `decoders` then."""
    decoders: Positive = 2
    """Decoding processes of a replica: as many objects are decoded at once."""
    models_in_memory: Positive = 3
    """Models that a replica keeps loaded; the least recently used goes first."""
    batch_size: Positive | None = None
    """Objects, and frames a forward pass, at most; null is 16 on CPUs, 128 on GPUs."""
    batch_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How long an object waits for company; 0 batches what has come while the last batch was computed."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Precision of the forward pass, as for scoring; `auto` is the device's own."""

    @model_validator(mode="after")
    def _consistent(self) -> ScaleConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"`min_replicas` ({self.min_replicas}) must not be above `max_replicas` ({self.max_replicas})"
            )
        return self


class RecordConfig(Section):
    """Whether answers are kept as rows of the tables that score jobs write (docs/serving.md)."""

    output: str | None = None
    """Folder or URI whose tables take a row for every answer, as the `output` of score jobs; null keeps none."""
    every_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """Rows wait so long for others to be committed with; each commit is a run of its own in `runs`."""
    max_waiting_rows: Positive = 10_000
    """Rows that may wait, as while the store is away; beyond them requests are refused (503) until they are written."""
    max_waiting_bytes: Positive = 256 << 20
    """Likewise of their masks, in bytes."""
    masks: bool = True
    """Keep the masks, as `save_masks` of score jobs does."""


class ServeJob(Section):
    """Answer single images over HTTP with the models of bundles."""

    bundles: tuple[str, ...]
    """Folders or URIs of bundles, or of pointers called `current`; the first is the one that answers where a request names none."""
    reload_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How often bundles are looked at for a new version, which then takes over without a request lost; 0 never looks."""
    worklist: str | None = None
    """The `output` of score jobs, whose tables the viewer's worklist shows and whose images it opens; null shows none."""
    record: RecordConfig = RecordConfig()
    """Whether answers are kept as rows of the tables."""
    privacy: PrivacyConfig = PrivacyConfig()
    """Pseudonyms and header fields of those rows, as for score jobs; the key is needed with `record.output` alone."""
    http: HttpConfig = HttpConfig()
    """Address, token, TLS."""
    limits: RequestLimits = RequestLimits()
    """Limits of requests."""
    scale: ScaleConfig = ScaleConfig()
    """Replicas and batches."""
    decode: ServingDecodeConfig = ServingDecodeConfig()
    """Decoder limits."""
    ray: RayConfig = RayConfig()
    """Where Ray runs."""
    logging: LoggingConfig = LoggingConfig()
    """What standard error carries."""

    @model_validator(mode="after")
    def _consistent(self) -> ServeJob:
        if not self.bundles:
            raise ValueError("`bundles` must name at least one bundle")
        return self
