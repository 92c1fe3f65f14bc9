import { defineConfig } from "vite";

// `npm run dev` talks to a gateway that runs already.
const gateway = "http://127.0.0.1:8080";

export default defineConfig({
  base: "/console/",
  build: {
    outDir: "../gateway/internal/web/dist",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0, // the Content-Security-Policy allows no data: scripts or styles
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
  },
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  server: { proxy: { "/v1": gateway, "/readyz": gateway } },
});
