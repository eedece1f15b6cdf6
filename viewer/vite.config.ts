import { defineConfig } from "vite";

// Readable output under fixed names: it is committed, and a reviewer should be able to read the difference.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../medvision_ray/serving/static",
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
