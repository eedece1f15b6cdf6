// Light and dark: as the system says, until a person says otherwise.

import { fill, icon } from "./dom";

const KEY = "medvision-theme";
const MOON = "M16 11.5A6.5 6.5 0 1 1 8.5 4a5.2 5.2 0 0 0 7.500 7.500z";
const SUN = "M10 6.500a3.500 3.500 0 1 1 0 7 3.500 3.500 0 0 1 0-7zM10 2v1.500M10 16.500V18M2 10h1.500M16.500 10H18M4.300 4.300l1.100 1.100M14.600 14.600l1.100 1.100M15.700 4.300l-1.100 1.100M5.400 14.600l-1.100 1.100";

export function setUpTheme(button: HTMLElement): void {
  const system = matchMedia("(prefers-color-scheme: light)");
  const apply = (): void => {
    const theme = localStorage.getItem(KEY) ?? (system.matches ? "light" : "dark");
    document.documentElement.dataset.theme = theme;
    fill(button, icon(theme === "dark" ? SUN : MOON));
    button.title = theme === "dark" ? "Light" : "Dark";
  };
  system.addEventListener("change", apply);
  button.addEventListener("click", () => {
    localStorage.setItem(KEY, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
  });
  apply();
}
