// A model card's Markdown as elements: headings, paragraphs, lists, code blocks, bold and code. Nothing else is needed of it.

import { h } from "./dom";

/** Elements of a card; whatever looks like HTML is shown as text. */
export function render(markdown: string): HTMLElement[] {
  const out: HTMLElement[] = [];
  const lines = markdown.split(/\r?\n/);
  let paragraph: string[] = [];
  let list: HTMLUListElement | null = null;
  const flush = (): void => {
    if (paragraph.length) out.push(h("p", {}, ...inline(paragraph.join(" "))));
    paragraph = [];
    list = null;
  };
  for (let place = 0; place < lines.length; place++) {
    const line = lines[place]!;
    const heading = /^(#{1,4}) +(.*)$/.exec(line);
    const item = /^[-*] +(.*)$/.exec(line);
    if (line.startsWith("```")) {
      flush();
      const end = lines.indexOf("```", place + 1);
      const stop = end < 0 ? lines.length : end;
      out.push(h("pre", {}, h("code", {}, lines.slice(place + 1, stop).join("\n"))));
      place = stop;
    } else if (heading) {
      flush();
      const level = heading[1]!.length as 1 | 2 | 3 | 4;
      out.push(h(`h${level}` as "h2", {}, ...inline(heading[2]!)));
    } else if (item) {
      if (!list) {
        flush();
        list = h("ul");
        out.push(list);
      }
      list.append(h("li", {}, ...inline(item[1]!)));
    } else if (!line.trim()) flush();
    else if (list && /^\s/.test(line)) (list as HTMLUListElement).lastElementChild!.append(" ", ...inline(line.trim()));
    else {
      if (list) flush();
      paragraph.push(line.trim());
    }
  }
  flush();
  return out;
}

function inline(text: string): (Node | string)[] {
  return text.split(/(\*\*[^*]+\*\*|`[^`]+`)/).filter(Boolean).map((part) => {
    if (part.startsWith("**") && part.length > 4) return h("strong", {}, part.slice(2, -2));
    if (part.startsWith("`") && part.length > 2) return h("code", {}, part.slice(1, -1));
    return part;
  });
}
