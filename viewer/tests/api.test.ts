import { afterEach, describe, expect, it, vi } from "vitest";
import { Api, mediaType, Problem } from "../src/api";

afterEach(() => vi.unstubAllGlobals());

class Memory {
  private readonly kept = new Map<string, string>();
  getItem = (key: string): string | null => this.kept.get(key) ?? null;
  setItem = (key: string, value: string): void => void this.kept.set(key, value);
  removeItem = (key: string): void => void this.kept.delete(key);
}

const problem = (status: number, code: string): Response =>
  new Response(JSON.stringify({ status, code, detail: "Why." }), { status, headers: { "Content-Type": "application/problem+json" } });

function server(valid: () => string) {
  const seen: (string | null)[] = [];
  vi.stubGlobal("fetch", async (_: URL, init: RequestInit) => {
    const given = new Headers(init.headers).get("Authorization");
    seen.push(given);
    return given === `Bearer ${valid()}` ? Response.json({ models: [{ id: "m" }] }) : problem(401, "unauthorized");
  });
  return seen;
}

describe("tokens", () => {
  it("are asked for, kept, and asked for again once they are refused", async () => {
    let valid = "one";
    const seen = server(() => valid);
    const asked: string[] = [];
    const api = new Api("http://here/", async (reason) => (asked.push(reason), valid), new Memory() as unknown as Storage);
    await api.models();
    await api.models();
    valid = "two";
    expect(await api.models()).toEqual([{ id: "m" }]);
    expect(asked).toEqual(["needed", "refused"]);
    expect(seen).toEqual([null, "Bearer one", "Bearer one", "Bearer one", "Bearer two"]);
  });

  it("are asked for once, however many requests wait", async () => {
    server(() => "one");
    const ask = vi.fn(async () => "one");
    const api = new Api("http://here/", ask, new Memory() as unknown as Storage);
    await Promise.all([api.models(), api.models(), api.models()]);
    expect(ask).toHaveBeenCalledTimes(1);
  });

  it("that nobody gives end the request", async () => {
    server(() => "one");
    const api = new Api("http://here/", async () => null, new Memory() as unknown as Storage);
    await expect(api.models()).rejects.toMatchObject({ status: 401, code: "unauthorized" });
  });
});

describe("problems", () => {
  const api = () => new Api("http://here/", async () => null, new Memory() as unknown as Storage);

  it("carry the server's code and sentence", async () => {
    vi.stubGlobal("fetch", async () => problem(422, "truncated"));
    await expect(api().models()).rejects.toEqual(new Problem(422, "truncated", "Why."));
  });

  it("of a proxy's own page are its status", async () => {
    vi.stubGlobal("fetch", async () => new Response("<h1>Bad gateway</h1>", { status: 502 }));
    await expect(api().models()).rejects.toMatchObject({ code: "http_502" });
  });

  it("of a server that is away say so", async () => {
    vi.stubGlobal("fetch", async () => Promise.reject(new TypeError("network")));
    await expect(api().models()).rejects.toMatchObject({ status: 0, code: "unreachable" });
  });
});

it("tells media types by content", () => {
  const file = (at: number, ...bytes: number[]): Uint8Array => {
    const data = new Uint8Array(512);
    data.set(bytes, at);
    return data;
  };
  expect(mediaType(file(128, 0x44, 0x49, 0x43, 0x4d))).toBe("application/dicom");
  expect(mediaType(file(0, 0x08, 0x00, 0x05, 0x00))).toBe("application/dicom");
  expect(mediaType(file(0, 0x89, 0x50, 0x4e, 0x47))).toBe("image/png");
  expect(mediaType(file(0, 0xff, 0xd8, 0xff, 0xe0))).toBe("image/jpeg");
  expect(mediaType(file(0, 0x1f, 0x8b, 8))).toBe("application/gzip");
  expect(mediaType(file(344, 0x6e, 0x2b, 0x31))).toBe("application/octet-stream");
  expect(mediaType(new Uint8Array(0))).toBe("application/octet-stream");
});
