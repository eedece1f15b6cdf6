// Asking for the access token.

import { byId } from "./dom";
import type { AskForToken } from "./api";

/** A dialog; answers null when it is closed without a token. */
export const askForToken: AskForToken = (reason) => {
  const dialog = byId<HTMLDialogElement>("token-dialog");
  const input = byId<HTMLInputElement>("token");
  byId("token-reason").textContent =
    reason === "refused" ? "The token was refused: it has expired or is another server's. Enter a new one to go on." : "This server asks for a token. Whoever runs it has one for you.";
  input.value = "";
  return new Promise((give) => {
    let given: string | null = null;
    const submit = (event: Event): void => {
      event.preventDefault();
      given = input.value.trim() || null;
      if (given) dialog.close();
    };
    const cancel = (): void => dialog.close();
    const form = byId("token-form");
    form.addEventListener("submit", submit);
    byId("token-cancel").addEventListener("click", cancel);
    dialog.addEventListener(
      "close",
      () => {
        form.removeEventListener("submit", submit);
        byId("token-cancel").removeEventListener("click", cancel);
        input.value = "";
        give(given);
      },
      { once: true },
    );
    dialog.showModal();
    input.focus();
  });
};
