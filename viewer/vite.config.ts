import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig, type Plugin } from "vite";

const SOURCES = ["index.html", "package.json", "src", "vite.config.ts"];
const BUILT = "../medvision_ray/serving/static";

/** Every file below, by its path with forward slashes, sorted. */
function files(...places: string[]): string[] {
  return places
    .flatMap((place) => {
      const below = /\.[a-z]+$/.test(place) ? null : readdirSync(place).map((name) => `${place}/${name}`);
      return below ? files(...below) : [place];
    })
    .sort();
}

function digest(root: string, paths: string[]): string {
  const hash = createHash("sha256");
  for (const path of paths) hash.update(`${path}\0`).update(readFileSync(join(root, path))).update("\0");
  return hash.digest("hex");
}

/** Writes down what was built of what, so that a test without Node sees when either was changed alone. */
const record: Plugin = {
  name: "record",
  closeBundle() {
    const built = ["assets/app.css", "assets/app.js", "assets/app.svg", "index.html"];
    const text = JSON.stringify({ sources: digest(".", files(...SOURCES)), built: digest(BUILT, built) }, null, 2);
    writeFileSync("built.json", `${text}\n`);
  },
};

// Readable output under fixed names: it is committed, and a reviewer should be able to read the difference.
export default defineConfig({
  base: "./",
  plugins: [record],
  build: {
    outDir: BUILT,
    emptyOutDir: true,
    assetsInlineLimit: 0,
    minify: false,
    cssMinify: false,
    modulePreload: { polyfill: false },
    target: "es2022",
    rollupOptions: {
      output: { entryFileNames: "assets/app.js", assetFileNames: "assets/app[extname]" },
    },
  },
});
