// src/api.ts
/** An answer that is an error, in the server's words. */
var Problem = class extends Error {
	status;
	code;
	detail;
	constructor(status, code, detail) {
		super(detail);
		this.status = status;
		this.code = code;
		this.detail = detail;
	}
};
var TOKEN = "medvision-token";
var Api = class {
	base;
	askForToken;
	store;
	asking = null;
	session = hex(crypto.getRandomValues(/* @__PURE__ */ new Uint8Array(16)));
	constructor(base, askForToken, store = sessionStorage) {
		this.base = base;
		this.askForToken = askForToken;
		this.store = store;
	}
	get hasToken() {
		return this.store.getItem(TOKEN) !== null;
	}
	forgetToken() {
		this.store.removeItem(TOKEN);
	}
	models() {
		return this.json("v1/models").then((answer) => answer.models);
	}
	async card(model) {
		return (await this.fetch(`v1/models/${encodeURIComponent(model)}/card`)).text();
	}
	async pixels(content, first, signal) {
		const address = `v1/pixels?first=${first}&session=${this.session}`;
		return (await this.fetch(address, {
			method: "POST",
			body: content,
			headers: { "Content-Type": "application/octet-stream" },
			signal
		})).arrayBuffer();
	}
	predict(content, type, model, explain, signal) {
		const query = new URLSearchParams();
		if (model) query.set("model", model);
		if (explain) query.set("explain", "gradcam");
		const address = `v1/predict${query.size ? `?${query}` : ""}`;
		return this.json(address, {
			method: "POST",
			body: content,
			headers: { "Content-Type": type },
			signal
		});
	}
	choices(nights) {
		return this.json(`v1/worklist/choices?nights=${nights}`);
	}
	worklist(query, signal) {
		return this.json(`v1/worklist?${query}`, { signal });
	}
	record(imageId, modelId) {
		return this.json(`v1/worklist/${imageId}?model_id=${encodeURIComponent(modelId)}`);
	}
	async sourcePixels(imageId, first, signal) {
		return (await this.fetch(`v1/worklist/${imageId}/pixels?first=${first}`, { signal })).arrayBuffer();
	}
	async json(address, init) {
		return (await this.fetch(address, init)).json();
	}
	/** One request; where the server wants a token or refuses ours, a person is asked and it is sent again. */
	async fetch(address, init = {}) {
		for (;;) {
			const token = this.store.getItem(TOKEN);
			const headers = new Headers(init.headers);
			if (token) headers.set("Authorization", `Bearer ${token}`);
			let response;
			try {
				response = await fetch(new URL(address, this.base), {
					...init,
					headers,
					credentials: "same-origin",
					cache: "no-store"
				});
			} catch (error) {
				if (error instanceof DOMException && error.name === "AbortError") throw error;
				throw new Problem(0, "unreachable", "The server does not answer. Is it running, and is this computer on its network?");
			}
			if (response.ok) return response;
			if (response.status !== 401) throw await problemOf(response);
			if (this.store.getItem(TOKEN) !== token) continue;
			if (!await this.newToken(token)) throw await problemOf(response);
		}
	}
	async newToken(old) {
		this.asking ??= this.askForToken(old ? "refused" : "needed").finally(() => this.asking = null);
		const given = await this.asking;
		if (given === null) return false;
		this.store.setItem(TOKEN, given);
		return true;
	}
};
async function problemOf(response) {
	let code = "";
	let detail = "";
	try {
		const body = await response.clone().json();
		if (typeof body.code === "string") code = body.code;
		if (typeof body.detail === "string") detail = body.detail;
	} catch {}
	return new Problem(response.status, code || `http_${response.status}`, detail || `The server answered ${response.status}.`);
}
function hex(bytes) {
	return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
/** The media type of a file by its first bytes; names and what the system thinks of them are not asked. */
function mediaType(start) {
	const has = (at, ...bytes) => bytes.every((byte, index) => start[at + index] === byte);
	if (has(128, 68, 73, 67, 77)) return "application/dicom";
	if (has(0, 137, 80, 78, 71)) return "image/png";
	if (has(0, 255, 216, 255)) return "image/jpeg";
	if (has(0, 31, 139)) return "application/gzip";
	if (has(0, 73, 73, 42, 0) || has(0, 77, 77, 0, 42)) return "image/tiff";
	if (has(0, 66, 77)) return "image/bmp";
	if (has(344, 110, 43, 49) || has(4, 110, 43, 50)) return "application/octet-stream";
	if (has(0, 8, 0) || has(0, 2, 0)) return "application/dicom";
	return "application/octet-stream";
}
// src/dom.ts
/** An element; `on...` properties are listeners, `class` and the others are attributes, false and null are left out. */
function h(tag, props = {}, ...children) {
	const element = document.createElement(tag);
	apply(element, props);
	append(element, children);
	return element;
}
var SVG = "http://www.w3.org/2000/svg";
/** The same for SVG. */
function s(tag, props = {}, ...children) {
	const element = document.createElementNS(SVG, tag);
	apply(element, props);
	append(element, children);
	return element;
}
function apply(element, props) {
	for (const [name, value] of Object.entries(props)) if (typeof value === "function") element.addEventListener(name.slice(2), value);
	else if (value === true) element.setAttribute(name, "");
	else if (value !== false && value !== null && value !== void 0) element.setAttribute(name, String(value));
}
function append(element, children) {
	for (const child of children) {
		if (child === null || child === void 0 || child === false) continue;
		element.append(child instanceof Node ? child : String(child));
	}
}
/** Replace an element's content. */
function fill(element, ...children) {
	element.replaceChildren();
	append(element, children);
}
/** The element of this id; a missing one is a mistake in index.html. */
function byId(id) {
	const found = document.getElementById(id);
	if (!found) throw new Error(`index.html has no #${id}`);
	return found;
}
/** A line icon of 20 x 20, drawn from path data. */
function icon(path) {
	return s("svg", {
		viewBox: "0 0 20 20",
		class: "icon",
		"aria-hidden": "true"
	}, s("path", {
		d: path,
		fill: "none",
		stroke: "currentColor",
		"stroke-width": 1.6,
		"stroke-linecap": "round",
		"stroke-linejoin": "round"
	}));
}
// src/card.ts
/** Elements of a card; whatever looks like HTML is shown as text. */
function render(markdown) {
	const out = [];
	const lines = markdown.split(/\r?\n/);
	let paragraph = [];
	let list = null;
	const flush = () => {
		if (paragraph.length) out.push(h("p", {}, ...inline(paragraph.join(" "))));
		paragraph = [];
		list = null;
	};
	for (let place = 0; place < lines.length; place++) {
		const line = lines[place];
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
			const level = heading[1].length;
			out.push(h(`h${level}`, {}, ...inline(heading[2])));
		} else if (item) {
			if (!list) {
				flush();
				list = h("ul");
				out.push(list);
			}
			list.append(h("li", {}, ...inline(item[1])));
		} else if (!line.trim()) flush();
		else if (list && /^\s/.test(line)) list.lastElementChild.append(" ", ...inline(line.trim()));
		else {
			if (list) flush();
			paragraph.push(line.trim());
		}
	}
	flush();
	return out;
}
function inline(text) {
	return text.split(/(\*\*[^*]+\*\*|`[^`]+`)/).filter(Boolean).map((part) => {
		if (part.startsWith("**") && part.length > 4) return h("strong", {}, part.slice(2, -2));
		if (part.startsWith("`") && part.length > 2) return h("code", {}, part.slice(1, -1));
		return part;
	});
}
// src/format.ts
/** A probability with two digits, three near the ends: 0.83, 0.997, 0.002. */
function probability(value) {
	if (value >= .9995 && value < 1) return ">0.999";
	if (value > 0 && value < 5e-4) return "<0.001";
	const nearAnEnd = value > .99 && value < 1 || value > 0 && value < .01;
	return value.toFixed(nearAnEnd ? 3 : 2);
}
function area(mm2) {
	return mm2 >= 1e3 ? `${(mm2 / 100).toFixed(1)} cm²` : `${mm2.toFixed(mm2 < 10 ? 1 : 0)} mm²`;
}
function share(fraction) {
	const percent = fraction * 100;
	return `${percent < 10 ? percent.toFixed(1) : percent.toFixed(0)} %`;
}
/** A window's number: whole where it is large, else as many digits as it needs. */
function windowNumber(value) {
	return Math.abs(value) >= 100 || Number.isInteger(value) ? String(Math.round(value)) : String(Number(value.toPrecision(4)));
}
/** `2026-11-26 01:54` of an ISO time, in the browser's zone. */
function localTime(iso) {
	const time = new Date(iso);
	if (Number.isNaN(time.getTime())) return iso;
	const two = (value) => String(value).padStart(2, "0");
	return `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())} ${two(time.getHours())}:${two(time.getMinutes())}`;
}
var SPACING = {
	pixel_spacing: "",
	calibrated: "calibrated",
	unverified: "not verified",
	imager: "at the detector",
	nominal_scanned: "on the scanned film",
	affine: "",
	none: ""
};
/** Pixel spacing with where it holds: `0.70 × 0.70 mm`, `0.14 × 0.14 mm at the detector`. */
function spacing(mm, source) {
	if (!mm) return "not known";
	const where = SPACING[source] ?? source;
	return `${mm[0].toPrecision(3)} × ${mm[1].toPrecision(3)} mm${where ? ` ${where}` : ""}`;
}
var MODALITIES = {
	CT: "CT",
	MR: "MR",
	CR: "X-ray (CR)",
	DX: "X-ray (DX)",
	RG: "X-ray film",
	XA: "Angiography",
	MG: "Mammography",
	US: "Ultrasound",
	PT: "PET",
	NM: "Nuclear medicine",
	OT: "Other"
};
function modality(code) {
	return MODALITIES[code] ?? code;
}
/** What a picture is called in few words: its modality, or its format where the file names none. */
function kindOf(header) {
	return header.modality === "OT" ? header.format.toUpperCase() : modality(header.modality);
}
function plural(count, one) {
	return `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;
}
// src/pixels.ts
var KINDS = {
	uint8: Uint8Array,
	rgb8: Uint8Array,
	int16: Int16Array,
	uint16: Uint16Array,
	float32: Float32Array
};
/** Read an answer; the frames are views of its bytes. Every browser that is still made is little-endian. */
function parse(answer) {
	const length = new DataView(answer).getUint32(0, true);
	const text = new TextDecoder().decode(new Uint8Array(answer, 4, length));
	const raw = JSON.parse(text);
	const header = {
		...raw,
		luts: raw.luts.map((lut) => ({
			...lut,
			values: decodeLut(lut.values)
		}))
	};
	const samples = header.height * header.width * (header.type === "rgb8" ? 3 : 1);
	const Kind = KINDS[header.type];
	const frames = Array.from({ length: raw.count }, (_, index) => new Kind(answer, 4 + length + index * samples * Kind.BYTES_PER_ELEMENT, samples));
	return {
		header,
		first: raw.first,
		frames
	};
}
function decodeLut(text) {
	const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
	return new Uint16Array(bytes.buffer);
}
/** The display chain of one frame. */
function displayOf(header, frame) {
	return header.displays[frame] ?? header.displays[0];
}
// src/results.ts
/** What stands where a result will be. */
function waiting(panel, text) {
	fill(panel, h("div", { class: "card muted busy" }, text));
}
function problemCard(panel, title, problem, retry) {
	const { code, detail } = wordsOf(problem);
	fill(panel, h("div", {
		class: "card problem",
		role: "alert"
	}, h("h2", {}, title), h("p", {}, detail), code && h("p", {}, h("code", {}, code)), retry && h("button", { onclick: retry }, "Try again")));
}
function wordsOf(problem) {
	if (problem instanceof Problem) return {
		code: problem.code,
		detail: problem.detail
	};
	return {
		code: "page_error",
		detail: "The page could not work with the server's answer."
	};
}
/** Show a result; `frame` is that of the frame on the stage, of a picture that has many. */
function showResult(panel, result, frame, when = null) {
	const label = labelText(result.predicted_label);
	const calibrated = result.classes.some((item) => typeof item.calibrated_probability === "number");
	fill(panel, h("section", {
		class: "card",
		"aria-label": "Classification"
	}, h("p", { class: "over" }, result.frames.length > 1 ? "Model output, all frames" : "Model output"), result.classes.length > 0 && h("h2", { class: "label" }, label), h("div", {
		class: "bars",
		role: "list"
	}, ...sorted(result.classes).map(bar)), result.classes.length > 0 && legend(result, calibrated), frame?.predicted_label != null && result.frames.length > 1 && h("p", { class: "frame" }, "This frame: ", h("b", {}, labelText(frame.predicted_label)), ` ${optional(frame.predicted_probability)}`)), maskCard(result, frame), h("p", { class: "fine" }, "Model ", h("code", {}, result.model_id), result.preprocess_id ? h("span", { title: "Preprocessing" }, " · preprocessing ", h("code", {}, result.preprocess_id)) : null, when && ` · scored ${when}`));
}
function labelText(label) {
	if (label === null) return "No classification";
	return label === "" ? "No finding over its operating point" : label.split("|").join(", ");
}
var optional = (value) => value === null ? "" : probability(value);
var shown = (item) => item.calibrated_probability ?? item.probability;
var sorted = (classes) => [...classes].sort((one, other) => shown(other) - shown(one));
/** One class: name, number, and a bar on which the operating points are marked. */
function bar(item) {
	const value = shown(item);
	const points = item.operating_points ?? [];
	const positive = points.some((point) => point.positive);
	const fillBar = h("div", { class: "fill" });
	fillBar.style.width = `${value * 100}%`;
	return h("div", {
		class: `bar${positive ? " positive" : ""}${points.length ? "" : " bare"}`,
		role: "listitem",
		"aria-label": spoken(item, value)
	}, h("span", { class: "name" }, item.name), points.length > 0 && h("span", { class: "verdict" }, positive ? "▲ over" : "under"), h("span", {
		class: "number",
		title: rawText(item)
	}, probability(value)), h("div", {
		class: "track",
		"aria-hidden": "true"
	}, fillBar, ...points.map(tick)));
}
function tick(point) {
	const mark = h("i", {
		class: "tick",
		title: `${point.name}: ${probability(point.threshold)}`
	});
	mark.style.left = `${point.threshold * 100}%`;
	return mark;
}
function spoken(item, value) {
	const points = (item.operating_points ?? []).map((point) => `, ${point.positive ? "over" : "under"} the operating point ${point.name} at ${probability(point.threshold)}`);
	return `${item.name}: ${probability(value)}${points.join("")}`;
}
var rawText = (item) => typeof item.calibrated_probability === "number" ? `Calibrated; raw ${probability(item.probability)}` : null;
function legend(result, calibrated) {
	const names = [...new Set(result.classes.flatMap((item) => (item.operating_points ?? []).map((point) => point.name)))];
	return h("p", { class: "fine" }, calibrated ? "Calibrated probability" : "Probability as the model gives it, not calibrated", names.length > 0 && " · ", names.length > 0 && h("i", {
		class: "tick inline",
		"aria-hidden": "true"
	}), names.length > 0 && ` operating point: ${names.join("; ")}`);
}
function maskCard(result, frame) {
	const mask = result.frames.length > 1 ? frame?.mask ?? null : result.mask;
	if (!result.mask && !mask) return null;
	return h("section", {
		class: "card",
		"aria-label": "Mask"
	}, h("h3", {}, result.frames.length > 1 ? "Mask on this frame" : "Mask"), list(maskFacts(mask, result.mask)));
}
function maskFacts(mask, whole) {
	if (!mask || !mask.box) return [["Area", whole?.box && whole !== mask ? "none on this frame" : "nothing marked"]];
	const [top, left, bottom, right] = mask.box;
	const facts = [
		["Area", mask.area_mm2 === null ? "not known in mm² (no true spacing)" : area(mask.area_mm2)],
		["Share", `${share(mask.fraction)} of the frame`],
		["Box", `rows ${top}–${bottom - 1}, columns ${left}–${right - 1}`]
	];
	if (mask.contours === null) facts.push(["Outline", "not saved by this run"]);
	return facts;
}
/** What the file says of itself. */
function showFacts(panel, header, count) {
	const facts = [
		["Modality", header.modality === "OT" ? "not named by the file" : modality(header.modality)],
		["Format", header.format.toUpperCase()],
		["Size", `${header.width} × ${header.height}${count > 1 ? ` × ${count}` : ""}`],
		["Stored as", header.type === "rgb8" ? "8-bit RGB" : header.type],
		["Pixel spacing", spacing(header.spacing_mm, header.spacing_source)]
	];
	if (header.slice_spacing_mm !== null) facts.push(["Slice spacing", `${header.slice_spacing_mm.toPrecision(3)} mm`]);
	fill(panel, h("section", {
		class: "card",
		"aria-label": "Image"
	}, h("h3", {}, "Image"), list(facts)), header.may_contain_text && h("p", { class: "fine" }, "Pictures of this kind can have letters burned into them, a name among others."));
}
function list(facts) {
	return h("dl", {}, ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}
// src/source.ts
var KEPT_BYTES = 512 * 2 ** 20;
/** One object; frames come in chunks as they are looked at, and the oldest chunks go when they are many. */
var ObjectSource = class {
	fetchChunk;
	keptBytes;
	header;
	chunks = /* @__PURE__ */ new Map();
	here = /* @__PURE__ */ new Map();
	size;
	bytes;
	constructor(first, fetchChunk, keptBytes = KEPT_BYTES) {
		this.fetchChunk = fetchChunk;
		this.keptBytes = keptBytes;
		this.header = first.header;
		this.size = first.frames.length;
		this.bytes = first.frames.reduce((sum, frame) => sum + frame.byteLength, 0);
		this.keep(0, Promise.resolve(first.frames));
		this.here.set(0, first.frames);
	}
	get count() {
		return this.header.frames;
	}
	get order() {
		return this.header.slice_order.length === this.count ? this.header.slice_order : null;
	}
	frameAt(position) {
		return this.order ? this.order[position] : position;
	}
	positionOf(frame) {
		return this.order ? this.order.indexOf(frame) : frame;
	}
	display(frame) {
		return displayOf(this.header, frame);
	}
	ready(frame) {
		return this.here.get(Math.floor(frame / this.size))?.[frame % this.size] ?? null;
	}
	async load(frame) {
		const index = Math.floor(frame / this.size);
		return (await (this.chunks.get(index) ?? this.fetched(index)))[frame % this.size];
	}
	fileOf() {
		return 0;
	}
	fetched(index) {
		const coming = this.fetchChunk(index * this.size).then((answer) => parse(answer).frames);
		this.keep(index, coming);
		coming.then((frames) => this.chunks.get(index) === coming && this.here.set(index, frames), () => this.chunks.delete(index));
		return coming;
	}
	keep(index, frames) {
		this.chunks.set(index, frames);
		while (this.chunks.size > 1 && this.chunks.size * this.bytes > this.keptBytes) {
			const oldest = this.chunks.keys().next().value;
			this.chunks.delete(oldest);
			this.here.delete(oldest);
		}
	}
};
/** Slices of one series, each in its own file, ordered by where they lie. */
var StackSource = class {
	header;
	files;
	slices;
	/** `slices`: decoded single slices that share a stack name, with the number of the file that each is from. */
	constructor(slices) {
		const sorted = [...slices].sort((one, other) => height(one.chunk) - height(other.chunk));
		this.files = sorted.map((slice) => slice.file);
		this.slices = sorted.map((slice) => slice.chunk);
		const steps = this.slices.slice(1).map((slice, index) => height(slice) - height(this.slices[index]));
		const median = [...steps].sort((one, other) => one - other)[Math.floor(steps.length / 2)] ?? null;
		this.header = {
			...this.slices[0].header,
			frames: slices.length,
			slice_spacing_mm: median
		};
	}
	get count() {
		return this.slices.length;
	}
	frameAt(position) {
		return position;
	}
	positionOf(frame) {
		return frame;
	}
	display(frame) {
		return displayOf(this.slices[frame].header, 0);
	}
	ready(frame) {
		return this.slices[frame]?.frames[0] ?? null;
	}
	load(frame) {
		return Promise.resolve(this.slices[frame].frames[0]);
	}
	fileOf(frame) {
		return this.files[frame];
	}
};
var height = (chunk) => chunk.header.stack?.position_mm ?? 0;
// src/files.ts
var MOST_FILES = 2e3;
var AT_ONCE = 2;
var STACK_BYTES = 2 ** 30;
/** Decode files; `onFirst` gets the first that can be shown, as soon as it can, the promise all of them. */
async function readFiles(api, files, onFirst, onProgress) {
	const chosen = files.slice(0, MOST_FILES);
	const decoded = new Array(chosen.length);
	let next = 0;
	let done = 0;
	let kept = 0;
	let first = true;
	const work = async () => {
		for (let index = next++; index < chosen.length; index = next++) {
			const file = chosen[index];
			const found = {
				file,
				number: index + 1,
				header: null,
				slice: null,
				problem: null
			};
			decoded[index] = found;
			try {
				const chunk = parse(await api.pixels(file, 0));
				found.header = chunk.header;
				const size = chunk.frames.reduce((sum, frame) => sum + frame.byteLength, 0);
				if (chunk.header.stack && kept + size <= STACK_BYTES) {
					kept += size;
					found.slice = chunk;
				}
				if (first) {
					first = false;
					onFirst(single(api, found, chunk));
				}
			} catch (problem) {
				found.problem = problem;
			}
			onProgress(++done, chosen.length);
		}
	};
	await Promise.all(Array.from({ length: Math.min(AT_ONCE, chosen.length) }, work));
	return items(api, decoded);
}
function items(api, decoded) {
	const series = /* @__PURE__ */ new Map();
	for (const one of decoded) {
		const name = one.slice?.header.stack?.name;
		if (name) series.set(name, [...series.get(name) ?? [], one]);
	}
	const out = [];
	let number = 0;
	for (const one of decoded) {
		const name = one.slice?.header.stack?.name;
		const group = name ? series.get(name) : [one];
		if (group.length === 1 || !distinct(group)) out.push(single(api, one, null));
		else if (group[0] === one) out.push(stack(group, ++number));
	}
	return out;
}
/** Whether every slice has a place of its own; slices at one place are two acquisitions, and no stack. */
function distinct(group) {
	return new Set(group.map((one) => one.slice.header.stack.position_mm)).size === group.length;
}
function single(api, one, chunk) {
	const fetchChunk = (first) => api.pixels(one.file, first);
	return {
		title: `File ${one.number}`,
		files: [one.file],
		header: one.header,
		problem: one.problem,
		open: async () => new ObjectSource(chunk ?? parse(await fetchChunk(0)), fetchChunk)
	};
}
function stack(group, number) {
	const source = new StackSource(group.map((one, file) => ({
		file,
		chunk: one.slice
	})));
	return {
		title: `Series ${number}`,
		files: group.map((one) => one.file),
		header: source.header,
		problem: null,
		open: () => Promise.resolve(source)
	};
}
/** A file's media type by its content. */
async function typeOf(file) {
	return mediaType(new Uint8Array(await file.slice(0, 512).arrayBuffer()));
}
/** Files of a drop, folders and all that is below them, in the order of their paths. */
async function dropped(data) {
	const entries = Array.from(data.items, (item) => item.webkitGetAsEntry?.() ?? null);
	if (entries.every((entry) => entry === null)) return Array.from(data.files);
	const found = [];
	const walk = async (entry) => {
		if (found.length >= MOST_FILES) return;
		if (entry.isFile) {
			const file = await new Promise((give, refuse) => entry.file(give, refuse));
			if (wanted(file.name)) found.push({
				path: entry.fullPath,
				file
			});
		} else {
			const reader = entry.createReader();
			for (;;) {
				const some = await new Promise((give, refuse) => reader.readEntries(give, refuse));
				if (!some.length) break;
				for (const inner of some) await walk(inner);
			}
		}
	};
	for (const entry of entries) if (entry) await walk(entry);
	return found.sort((one, other) => compare(one.path, other.path)).map((item) => item.file);
}
/** Files of an input, in the order of their paths. */
function chosen(input) {
	const path = (file) => file.webkitRelativePath || file.name;
	const files = Array.from(input.files ?? []).filter((file) => wanted(file.name));
	input.value = "";
	return files.sort((one, other) => compare(path(one), path(other)));
}
var wanted = (name) => !name.startsWith(".") && name !== "DICOMDIR" && name !== "Thumbs.db";
var compare = (one, other) => one.localeCompare(other, "en", { numeric: true });
/** The list of what is open; names of files can name patients, so they are shown only when asked for. */
function showList(panel, all, current, names, choose, setNames) {
	if (all.length < 2) return fill(panel);
	const box = h("input", {
		type: "checkbox",
		id: "names",
		onchange: () => setNames(box.checked)
	});
	box.checked = names;
	fill(panel, h("section", {
		class: "card files",
		"aria-label": "Open files"
	}, h("h3", {}, plural(all.length, "item"), h("label", { class: "names" }, box, "File names")), h("ul", {}, ...all.map((item) => h("li", {}, h("button", {
		class: `item${item.problem ? " bad" : ""}`,
		"aria-current": item === current ? "true" : null,
		onclick: () => choose(item)
	}, h("span", { class: "title" }, names ? item.files[0].name : item.title), h("span", { class: "what" }, describe(item))))))));
}
function describe(item) {
	if (item.problem) return `✕ ${wordsOf(item.problem).code}`;
	const { header } = item;
	if (!header) return "";
	const size = `${header.width} × ${header.height}`;
	return `${kindOf(header)} · ${size}${header.frames > 1 ? ` × ${header.frames}` : ""}`;
}
// src/keys.ts
/** Act on keys pressed anywhere but in fields and open dialogs; `active` says whether the viewer is shown. */
function listenToKeys(actions, active) {
	document.addEventListener("keydown", (event) => {
		if (event.ctrlKey || event.metaKey || event.altKey || !active()) return;
		const target = event.target;
		if (target.closest("input:not([type=range]):not([type=checkbox]), select, textarea, dialog[open]")) return;
		if (document.querySelector("dialog[open]")) return;
		const onStage = target.id === "stage" || target === document.body;
		const name = `${event.shiftKey && event.key.length > 1 ? "Shift+" : ""}${event.key.length === 1 ? event.key.toLowerCase() : event.key}`;
		if (/Arrow|Page|Home|End|^ $/.test(name) && !onStage) return;
		const action = actions.find((one) => one.keys.includes(name));
		if (!action) return;
		event.preventDefault();
		action.do();
	});
}
var MOUSE = [
	["Drag left button", "Window: sideways its width, up and down its centre"],
	["Drag right or middle button, or Shift and drag", "Move the picture"],
	["Wheel", "Scroll frames; zoom where there is one frame"],
	["Ctrl and wheel, two fingers", "Zoom"],
	["Double click", "Fit to the stage"]
];
function showHelp(panel, actions) {
	const row = (keys, what) => h("tr", {}, h("th", { scope: "row" }, ...keys), h("td", {}, what));
	fill(panel, h("table", { class: "keys" }, h("tbody", {}, ...actions.map((one) => row(keyCaps(one.shown), one.what)), ...MOUSE.map(([gesture, what]) => row([gesture], what)))));
}
function keyCaps(text) {
	return text.split(" ").flatMap((key, index) => [index ? " " : "", h("kbd", {}, key)]);
}
// src/theme.ts
var KEY = "medvision-theme";
var MOON = "M16 11.5A6.5 6.5 0 1 1 8.5 4a5.2 5.2 0 0 0 7.500 7.500z";
var SUN = "M10 6.500a3.500 3.500 0 1 1 0 7 3.500 3.500 0 0 1 0-7zM10 2v1.500M10 16.500V18M2 10h1.500M16.500 10H18M4.300 4.300l1.100 1.100M14.600 14.600l1.100 1.100M15.700 4.300l-1.100 1.100M5.400 14.600l-1.100 1.100";
function setUpTheme(button) {
	const system = matchMedia("(prefers-color-scheme: light)");
	const apply = () => {
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
// src/token.ts
/** A dialog; answers null when it is closed without a token. */
var askForToken = (reason) => {
	const dialog = byId("token-dialog");
	const input = byId("token");
	byId("token-reason").textContent = reason === "refused" ? "The token was refused: it has expired or is another server's. Enter a new one to go on." : "This server asks for a token. Whoever runs it has one for you.";
	input.value = "";
	return new Promise((give) => {
		let given = null;
		const submit = (event) => {
			event.preventDefault();
			given = input.value.trim() || null;
			if (given) dialog.close();
		};
		const cancel = () => dialog.close();
		const form = byId("token-form");
		form.addEventListener("submit", submit);
		byId("token-cancel").addEventListener("click", cancel);
		dialog.addEventListener("close", () => {
			form.removeEventListener("submit", submit);
			byId("token-cancel").removeEventListener("click", cancel);
			input.value = "";
			give(given);
		}, { once: true });
		dialog.showModal();
		input.focus();
	});
};
// src/display.ts
var isLut = (scaling) => "values" in scaling;
/** A stored value in modality units. */
function modalityValue(stored, display) {
	return stored * display.slope + display.intercept;
}
/** A stored value's grey in [0, 1]; padding and what is no number is black. */
function unitValue(stored, display, scaling, invert = display.invert) {
	if (display.padding && stored >= display.padding[0] && stored <= display.padding[1]) return 0;
	const value = modalityValue(stored, display);
	const shown = isLut(scaling) ? lookUp(value, scaling) : windowed(value, scaling);
	if (Number.isNaN(shown)) return 0;
	return invert ? 1 - shown : shown;
}
/** DICOM PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID), C.11.2.1.3.2 (LINEAR_EXACT). */
function windowed(value, { center, width, function: kind, bounds }) {
	if (bounds && bounds[1] > bounds[0]) return clamp((value - bounds[0]) / (bounds[1] - bounds[0]));
	if (kind === "SIGMOID") return 1 / (1 + Math.exp(-4 * (value - center) / width));
	if (kind === "LINEAR_EXACT") {
		if (width <= 0) return Number.isNaN(value) ? NaN : value > center ? 1 : 0;
		return clamp((value - center) / width + .5);
	}
	if (width <= 1) return Number.isNaN(value) ? NaN : value > center - .5 ? 1 : 0;
	return clamp((value - (center - .5)) / (width - 1) + .5);
}
function lookUp(value, lut) {
	const index = Math.min(Math.max(rint(Number.isNaN(value) ? 0 : value) - lut.first, 0), lut.values.length - 1);
	return lut.values[index] / lutTop(lut);
}
/** White of a LUT: its declared depth, or its largest entry where that leaves the leading bit unused. */
function lutTop(lut) {
	const declared = 2 ** lut.bits - 1;
	const largest = lut.values.reduce((most, value) => Math.max(most, value), 0);
	return largest > Math.floor(declared / 2) ? declared : Math.max(largest, 1);
}
/** To the nearest, halves to even, as numpy rounds. */
function rint(value) {
	const down = Math.floor(value);
	if (value - down !== .5) return Math.round(value);
	return down % 2 === 0 ? down : down + 1;
}
var clamp = (value) => value < 0 ? 0 : value > 1 ? 1 : value;
/** [0, 1] to 8 bits by way of 16, as the scoring does. */
function to8(unit) {
	return Math.floor((rint(unit * 65535) + 128) / 257);
}
var RANGES = {
	uint8: [0, 255],
	int16: [-32768, 32767],
	uint16: [0, 65535]
};
/** Grey of every stored value of an integer type; the first entry belongs to the type's lowest value. */
function greyTable(type, display, scaling, invert) {
	const [lowest, highest] = RANGES[type];
	const unit = isLut(scaling) ? lutUnit(display, scaling, invert) : (stored) => unitValue(stored, display, scaling, invert);
	const table = new Uint8Array(highest - lowest + 1);
	for (let stored = lowest; stored <= highest; stored++) table[stored - lowest] = to8(unit(stored));
	return table;
}
/** `unitValue` with a LUT whose white is looked for once, not once a value. */
function lutUnit(display, lut, invert) {
	const last = lut.values.length - 1;
	const white = lutTop(lut);
	return (stored) => {
		if (display.padding && stored >= display.padding[0] && stored <= display.padding[1]) return 0;
		const index = Math.min(Math.max(rint(modalityValue(stored, display)) - lut.first, 0), last);
		const shown = lut.values[index] / white;
		return invert ? 1 - shown : shown;
	};
}
/**
* A frame as RGBA, every `stride`th pixel of every `stride`th row.
*
* Colour is windowed channel by channel on its 0 to 255, which is brightness and contrast.
*/
function paint(values, header, display, scaling, invert, stride = 1) {
	const width = Math.ceil(header.width / stride);
	const height = Math.ceil(header.height / stride);
	const picture = new ImageData(width, height);
	const out = new Uint32Array(picture.data.buffer);
	if (header.type === "rgb8") paintColour(values, header, greyTable("uint8", display, scaling, invert), stride, out);
	else if (header.type === "float32") sample(header, stride, (from, to) => out[to] = grey(to8(unitValue(values[from], display, scaling, invert))));
	else {
		const table = greyTable(header.type, display, scaling, invert);
		const lowest = RANGES[header.type][0];
		const shades = Uint32Array.from(table, grey);
		if (stride === 1) for (let place = 0; place < values.length; place++) out[place] = shades[values[place] - lowest];
		else paintShades(values, header, shades, lowest, stride, out);
	}
	return picture;
}
/** Written out: this is what a drag over a large picture waits for. */
function paintShades(values, header, shades, lowest, stride, out) {
	const { width, height } = header;
	let to = 0;
	for (let row = 0; row < height; row += stride) {
		const end = (row + 1) * width;
		for (let from = row * width; from < end; from += stride) out[to++] = shades[values[from] - lowest];
	}
}
var grey = (value) => (4278190080 | value << 16 | value << 8 | value) >>> 0;
function paintColour(values, header, table, stride, out) {
	sample(header, stride, (from, to) => {
		const [red, green, blue] = [
			table[values[3 * from]],
			table[values[3 * from + 1]],
			table[values[3 * from + 2]]
		];
		out[to] = (4278190080 | blue << 16 | green << 8 | red) >>> 0;
	});
}
function sample(header, stride, take) {
	let to = 0;
	for (let row = 0; row < header.height; row += stride) {
		const start = row * header.width;
		for (let column = 0; column < header.width; column += stride) take(start + column, to++);
	}
}
/** Windows that radiologists know by name, in HU. */
var PRESETS = [
	[
		"Soft tissue",
		40,
		400
	],
	[
		"Lung",
		-600,
		1500
	],
	[
		"Bone",
		480,
		2500
	],
	[
		"Brain",
		40,
		80
	],
	[
		"Liver",
		60,
		160
	]
];
/** A window from the values of a frame: its 0.5th to 99.5th percentile, padding left out. */
function autoWindow(values, display) {
	const step = Math.max(1, Math.floor(values.length / 65536));
	const found = [];
	for (let place = 0; place < values.length; place += step) {
		const stored = values[place];
		if (display.padding && stored >= display.padding[0] && stored <= display.padding[1]) continue;
		const value = modalityValue(stored, display);
		if (Number.isFinite(value)) found.push(value);
	}
	if (!found.length) return {
		center: 0,
		width: 1,
		function: "LINEAR_EXACT"
	};
	found.sort((one, other) => one - other);
	const at = (share) => found[Math.min(found.length - 1, Math.floor(share * found.length))];
	const [low, high] = [at(.005), at(.995)];
	return {
		center: (low + high) / 2,
		width: Math.max(high - low, 1e-6),
		function: "LINEAR_EXACT"
	};
}
// src/gestures.ts
var WINDOW_SHARE = 1 / 300;
/** Listen on the stage; a drag with the left button changes the window, with another or Shift it pans, two fingers zoom. */
function listen(canvas, stage) {
	const pointers = /* @__PURE__ */ new Map();
	let drag = "window";
	let wheeled = 0;
	canvas.addEventListener("pointerdown", (event) => {
		if (!stage.current) return;
		canvas.setPointerCapture(event.pointerId);
		pointers.set(event.pointerId, at(canvas, event));
		drag = event.button !== 0 || event.shiftKey ? "pan" : "window";
		canvas.dataset.drag = pointers.size > 1 ? "pan" : drag;
		stage.interact(true);
		canvas.focus({ preventScroll: true });
		if (event.button === 1) event.preventDefault();
	});
	canvas.addEventListener("pointermove", (event) => {
		const now = at(canvas, event);
		const before = pointers.get(event.pointerId);
		if (!before) return stage.point(now.x, now.y);
		if (pointers.size > 1) pinch(stage, pointers, event.pointerId, now);
		else if (drag === "pan") stage.pan(now.x - before.x, now.y - before.y);
		else stage.nudgeWindow((now.y - before.y) * WINDOW_SHARE, (now.x - before.x) * WINDOW_SHARE);
		pointers.set(event.pointerId, now);
	});
	const end = (event) => {
		pointers.delete(event.pointerId);
		if (pointers.size) return;
		delete canvas.dataset.drag;
		stage.interact(false);
	};
	canvas.addEventListener("pointerup", end);
	canvas.addEventListener("pointercancel", end);
	canvas.addEventListener("pointerleave", () => stage.onCursor(null));
	canvas.addEventListener("contextmenu", (event) => event.preventDefault());
	canvas.addEventListener("dblclick", () => stage.fit());
	canvas.addEventListener("wheel", (event) => {
		if (!stage.current) return;
		event.preventDefault();
		const pixels = event.deltaY * (event.deltaMode === 1 ? 16 : 1);
		if (event.ctrlKey || event.metaKey || stage.current.source.count === 1) {
			const { x, y } = at(canvas, event);
			return stage.zoom(Math.exp(-pixels / 400), x, y);
		}
		wheeled += pixels;
		const steps = Math.trunc(wheeled / 60);
		if (steps) {
			wheeled -= steps * 60;
			stage.step(Math.sign(steps) * Math.min(Math.abs(steps), 5));
		}
	}, { passive: false });
}
function at(canvas, event) {
	const box = canvas.getBoundingClientRect();
	return {
		x: event.clientX - box.left,
		y: event.clientY - box.top
	};
}
function pinch(stage, pointers, id, now) {
	const before = pointers.get(id);
	const other = [...pointers].find(([key]) => key !== id)[1];
	const apart = (point) => Math.hypot(point.x - other.x, point.y - other.y) || 1;
	stage.zoom(apart(now) / apart(before), (now.x + other.x) / 2, (now.y + other.y) / 2);
	stage.pan((now.x - before.x) / 2, (now.y - before.y) / 2);
}
// src/overlay.ts
/** Orange of Okabe and Ito's palette, told apart with every common colour vision; on a dark line, over any grey. */
var MASK = "230, 159, 0";
/** Outlines as a path in CSS pixels; a contour runs through the centres of its pixels. */
function outline(contours, view, aspect) {
	const path = new Path2D();
	for (const line of contours) {
		line.forEach(([row, column], index) => {
			const x = view.x + (column + .5) * view.scale;
			const y = view.y + (row + .5) * view.scale * aspect;
			if (index === 0) path.moveTo(x, y);
			else path.lineTo(x, y);
		});
		path.closePath();
	}
	return path;
}
/** Draw a mask: its area by `opacity`, its outline always. */
function drawMask(context, contours, view, aspect, opacity) {
	if (!contours.length) return;
	const path = outline(contours, view, aspect);
	context.save();
	context.fillStyle = `rgba(${MASK}, ${opacity})`;
	context.fill(path, "evenodd");
	context.lineJoin = "round";
	context.strokeStyle = "rgba(0, 0, 0, 0.65)";
	context.lineWidth = 3.5;
	context.stroke(path);
	context.strokeStyle = `rgb(${MASK})`;
	context.lineWidth = 1.75;
	context.stroke(path);
	context.restore();
}
/** Heat as a picture of colour and transparency: little is clear, much is bright (stops of matplotlib's magma). */
async function heatPicture(png) {
	const image = new Image();
	image.src = `data:image/png;base64,${png}`;
	await image.decode();
	const canvas = document.createElement("canvas");
	canvas.width = image.naturalWidth;
	canvas.height = image.naturalHeight;
	const context = canvas.getContext("2d", { willReadFrequently: true });
	context.drawImage(image, 0, 0);
	const picture = context.getImageData(0, 0, canvas.width, canvas.height);
	if (isGrey(picture.data)) {
		colour(picture.data);
		context.putImageData(picture, 0, 0);
	}
	return canvas;
}
function isGrey(data) {
	for (let place = 0; place < data.length; place += 4) if (data[place] !== data[place + 1] || data[place] !== data[place + 2] || data[place + 3] !== 255) return false;
	return true;
}
var STOPS = [
	[
		0,
		0,
		4
	],
	[
		81,
		18,
		124
	],
	[
		183,
		55,
		121
	],
	[
		252,
		137,
		97
	],
	[
		252,
		253,
		191
	]
];
/** Colour and alpha of a heat of 0 to 255. */
function heatColour(heat) {
	const place = heat / 255 * (STOPS.length - 1);
	const index = Math.min(Math.floor(place), STOPS.length - 2);
	const share = place - index;
	const [from, to] = [STOPS[index], STOPS[index + 1]];
	const mix = (channel) => Math.round(from[channel] + (to[channel] - from[channel]) * share);
	return [
		mix(0),
		mix(1),
		mix(2),
		Math.round(255 * Math.min(1, heat / 160))
	];
}
function colour(data) {
	const table = Array.from({ length: 256 }, (_, heat) => heatColour(heat));
	for (let place = 0; place < data.length; place += 4) data.set(table[data[place]], place);
}
// src/view.ts
var LEAST = .02;
var MOST = 60;
/** How much higher than wide a pixel is. */
function pixelAspect(spacing) {
	return spacing && spacing[1] > 0 ? spacing[0] / spacing[1] : 1;
}
/** The whole picture, centred. */
function fitted(picture, aspect, stage) {
	return centred(picture, aspect, stage, Math.min(stage.width / picture.width, stage.height / (picture.height * aspect)));
}
/** The picture at a scale, centred. */
function centred(picture, aspect, stage, scale) {
	return {
		scale,
		x: (stage.width - picture.width * scale) / 2,
		y: (stage.height - picture.height * aspect * scale) / 2
	};
}
/** Zoomed by a factor; the point under the pointer stays. */
function zoomed(view, factor, x, y) {
	const scale = Math.min(Math.max(view.scale * factor, LEAST), MOST);
	const real = scale / view.scale;
	return {
		scale,
		x: x - (x - view.x) * real,
		y: y - (y - view.y) * real
	};
}
/** Moved, but never so far that nothing of the picture is left on the stage. */
function panned(view, dx, dy, picture, aspect, stage) {
	const margin = 40;
	const keep = (at, length, room) => Math.min(Math.max(at, margin - length), room - margin);
	return {
		scale: view.scale,
		x: keep(view.x + dx, picture.width * view.scale, stage.width),
		y: keep(view.y + dy, picture.height * aspect * view.scale, stage.height)
	};
}
/** Row and column of the pixel under a point of the stage; null beside the picture. */
function pixelAt(view, aspect, picture, x, y) {
	const column = Math.floor((x - view.x) / view.scale);
	const row = Math.floor((y - view.y) / (view.scale * aspect));
	return row >= 0 && column >= 0 && row < picture.height && column < picture.width ? [row, column] : null;
}
// src/stage.ts
var PREVIEW_PIXELS = 8e5;
var Stage = class {
	canvas;
	layers = {
		contours: null,
		showMask: true,
		maskOpacity: .25,
		heat: null,
		heatOpacity: .6
	};
	onState = () => {};
	onCursor = () => {};
	onLoading = () => {};
	source = null;
	values = null;
	frame = 0;
	position = 0;
	custom = null;
	inverted = false;
	view = {
		scale: 1,
		x: 0,
		y: 0
	};
	following = true;
	picture = document.createElement("canvas");
	painted = "";
	interacting = false;
	drawing = 0;
	constructor(canvas) {
		this.canvas = canvas;
		new ResizeObserver(() => this.resized()).observe(canvas);
	}
	/** Show a source from a position on; its own window is taken. */
	async show(source, position) {
		this.source = source;
		this.values = null;
		this.custom = null;
		this.inverted = false;
		this.painted = "";
		this.following = true;
		this.layers = {
			...this.layers,
			contours: null,
			heat: null
		};
		this.fit();
		await this.goTo(position);
	}
	clear() {
		this.source = this.values = null;
		this.canvas.removeAttribute("data-position");
		this.redraw();
	}
	get current() {
		return this.source && {
			source: this.source,
			frame: this.frame,
			position: this.position
		};
	}
	get display() {
		return this.source && this.source.display(this.frame);
	}
	/** The window in use; where the file has a LUT, the window of its inputs. */
	get window() {
		return this.custom ?? this.display?.window ?? {
			center: 0,
			width: 1,
			function: "LINEAR"
		};
	}
	async goTo(position) {
		const source = this.source;
		if (!source) return;
		this.position = Math.min(Math.max(position, 0), source.count - 1);
		const frame = source.frameAt(this.position);
		this.frame = frame;
		const here = source.ready(frame);
		if (!here) this.onLoading(true);
		this.tell();
		try {
			const values = here ?? await source.load(frame);
			if (this.source !== source || this.frame !== frame) return;
			this.values = values;
			this.redraw();
		} finally {
			if (this.source === source && this.frame === frame) this.onLoading(false);
		}
		this.tell();
	}
	step(by) {
		if (this.source && this.source.count > 1) this.goTo(this.position + by);
	}
	setWindow(center, width) {
		if (!Number.isFinite(center) || !Number.isFinite(width)) return;
		const kind = this.window.function;
		const least = kind === "LINEAR" && this.source?.header.type !== "float32" ? 1 : 1e-6;
		this.custom = {
			center,
			width: Math.max(width, least),
			function: kind
		};
		this.redraw();
		this.tell();
	}
	/** Change the window by shares of its own width, so that a drag feels the same on HU and on [0, 1]. */
	nudgeWindow(center, width) {
		const now = this.window;
		const unit = Math.max(now.width, 1e-6);
		this.setWindow(now.center + center * unit, now.width * Math.exp(width));
	}
	fileWindow() {
		this.custom = null;
		this.inverted = false;
		this.redraw();
		this.tell();
	}
	automaticWindow() {
		if (!this.values || !this.display) return;
		this.custom = autoWindow(this.values, this.display);
		this.redraw();
		this.tell();
	}
	invert() {
		this.inverted = !this.inverted;
		this.redraw();
		this.tell();
	}
	fit() {
		if (!this.source) return;
		this.following = true;
		this.view = fitted(this.source.header, this.aspect, this.room);
		this.redraw();
		this.tell();
	}
	oneToOne() {
		if (!this.source) return;
		this.following = false;
		const { scale, x, y } = centred(this.source.header, this.aspect, this.room, 1 / devicePixelRatio);
		const whole = (at) => Math.round(at * devicePixelRatio) / devicePixelRatio;
		this.view = {
			scale,
			x: whole(x),
			y: whole(y)
		};
		this.redraw();
		this.tell();
	}
	zoom(factor, x = this.room.width / 2, y = this.room.height / 2) {
		if (!this.source) return;
		this.following = false;
		this.view = zoomed(this.view, factor, x, y);
		this.redraw();
		this.tell();
	}
	pan(dx, dy) {
		if (!this.source) return;
		this.following = false;
		this.view = panned(this.view, dx, dy, this.source.header, this.aspect, this.room);
		this.redraw();
	}
	/** Pixel and value under a point of the stage. */
	point(x, y) {
		const at = this.source && pixelAt(this.view, this.aspect, this.source.header, x, y);
		this.onCursor(at ? {
			row: at[0],
			column: at[1],
			value: this.valueAt(at[0], at[1])
		} : null);
	}
	/** While a drag lasts, large pictures are painted coarsely. */
	interact(on) {
		this.interacting = on;
		if (!on) this.redraw();
	}
	redraw() {
		if (!this.drawing) this.drawing = requestAnimationFrame(() => this.draw());
	}
	get room() {
		return {
			width: this.canvas.clientWidth,
			height: this.canvas.clientHeight
		};
	}
	get aspect() {
		return pixelAspect(this.source?.header.spacing_mm ?? null);
	}
	get scaling() {
		const lut = this.display?.lut ?? null;
		return this.custom ?? (lut === null ? this.window : this.source.header.luts[lut]);
	}
	valueAt(row, column) {
		const { source, values, display } = this;
		if (!source || !values || !display) return "";
		const place = row * source.header.width + column;
		if (source.header.type === "rgb8") return `RGB ${values[3 * place]} ${values[3 * place + 1]} ${values[3 * place + 2]}`;
		const value = modalityValue(values[place], display);
		return `${Number.isInteger(value) ? String(value) : value.toPrecision(4)}${source.header.unit ? ` ${source.header.unit}` : ""}`;
	}
	resized() {
		const { width, height } = this.room;
		this.canvas.width = Math.round(width * devicePixelRatio);
		this.canvas.height = Math.round(height * devicePixelRatio);
		if (this.following) this.fit();
		this.redraw();
	}
	draw() {
		this.drawing = 0;
		const context = this.canvas.getContext("2d");
		context.setTransform(1, 0, 0, 1, 0, 0);
		context.clearRect(0, 0, this.canvas.width, this.canvas.height);
		const { source, values } = this;
		if (!source || !values) return;
		this.repaint(source, values);
		const { scale, x, y } = this.view;
		const [width, height] = [source.header.width * scale, source.header.height * scale * this.aspect];
		context.scale(devicePixelRatio, devicePixelRatio);
		context.imageSmoothingEnabled = scale * devicePixelRatio < 8 && scale * devicePixelRatio !== 1;
		context.imageSmoothingQuality = this.interacting ? "low" : "high";
		context.drawImage(this.picture, x, y, width, height);
		if (this.layers.heat) {
			context.globalAlpha = this.layers.heatOpacity;
			context.imageSmoothingEnabled = true;
			context.drawImage(this.layers.heat, x, y, width, height);
			context.globalAlpha = 1;
		}
		if (this.layers.showMask && this.layers.contours) drawMask(context, this.layers.contours, this.view, this.aspect, this.layers.maskOpacity);
	}
	/** The frame in grey, unless it is there as it is wanted. */
	repaint(source, values) {
		const pixels = source.header.width * source.header.height;
		const stride = this.interacting ? Math.max(1, Math.ceil(Math.sqrt(pixels / PREVIEW_PIXELS))) : 1;
		const wanted = JSON.stringify([
			this.frame,
			this.custom,
			this.inverted,
			stride
		]);
		if (wanted === this.painted) return;
		const display = source.display(this.frame);
		const picture = paint(values, source.header, display, this.scaling, display.invert !== this.inverted, stride);
		this.picture.width = picture.width;
		this.picture.height = picture.height;
		this.picture.getContext("2d").putImageData(picture, 0, 0);
		this.painted = wanted;
		this.canvas.dataset.painted = String(Number(this.canvas.dataset.painted ?? 0) + 1);
	}
	tell() {
		if (!this.source) return;
		this.canvas.dataset.position = String(this.position);
		this.onState({
			position: this.position,
			count: this.source.count,
			window: this.window,
			ownWindow: this.custom === null && !this.inverted,
			invert: this.inverted,
			zoom: this.view.scale * devicePixelRatio
		});
	}
};
// src/worklist.ts
var PAGE = 50;
var NIGHTS = 30;
var Worklist = class {
	api;
	open;
	say;
	table = "predictions";
	filters = {
		run_key: "",
		label: "",
		modality: "",
		model_id: "",
		min_probability: "",
		max_probability: "",
		order: "newest",
		error_code: ""
	};
	offset = 0;
	total = 0;
	choices = null;
	asked = null;
	rows = [];
	controls = h("div", {
		class: "filters",
		role: "search",
		"aria-label": "Filters"
	});
	body = h("div", { class: "rows" });
	pager = h("nav", {
		class: "pager",
		"aria-label": "Pages of the list"
	});
	constructor(root, api, open, say) {
		this.api = api;
		this.open = open;
		this.say = say;
		fill(root, this.controls, this.body, this.pager);
	}
	/** Called whenever the tab is shown: what there is to choose from may have grown. */
	async refresh() {
		if (!this.choices) fill(this.body, h("p", { class: "empty busy" }, "Reading the tables"));
		try {
			this.choices = await this.api.choices(NIGHTS);
		} catch (problem) {
			return this.fail(problem);
		}
		this.showControls();
		await this.load();
	}
	async load() {
		this.asked?.abort();
		const asked = new AbortController();
		this.asked = asked;
		this.body.setAttribute("aria-busy", "true");
		try {
			const found = await this.api.worklist(this.query(), asked.signal);
			this.rows = found.rows;
			this.total = found.total;
		} catch (problem) {
			if (!asked.signal.aborted) this.fail(problem);
			return;
		} finally {
			if (this.asked === asked) this.body.removeAttribute("aria-busy");
		}
		this.showRows();
		this.showPager();
		this.say(`${plural(this.total, this.table === "failures" ? "failure" : "image")}`);
	}
	query() {
		const query = new URLSearchParams({
			table: this.table,
			nights: String(NIGHTS),
			offset: String(this.offset),
			limit: String(PAGE)
		});
		const used = this.table === "failures" ? [
			"run_key",
			"model_id",
			"error_code"
		] : [
			"run_key",
			"model_id",
			"label",
			"modality",
			"min_probability",
			"max_probability",
			"order"
		];
		for (const [name, value] of Object.entries(this.filters)) if (value !== "" && used.includes(name)) query.set(name, value);
		return query;
	}
	fail(problem) {
		const { code, detail } = wordsOf(problem);
		const none = code === "no_tables";
		fill(this.body, h("div", {
			class: "empty",
			role: none ? null : "alert"
		}, h("h2", {}, none ? "No tables" : "The worklist cannot be read"), h("p", {}, none ? "This server was started without the output of a scoring job, so there is nothing to list." : detail), !none && h("p", {}, h("code", {}, code)), !none && h("button", { onclick: () => void this.refresh() }, "Try again")));
		fill(this.pager);
	}
	showControls() {
		const { runs, labels, modalities, models, error_codes } = this.choices;
		const failures = this.table === "failures";
		const kind = (value, text) => h("button", {
			"aria-pressed": String(this.table === value),
			onclick: () => this.switchTo(value)
		}, text);
		fill(this.controls, h("div", {
			class: "segments",
			role: "group",
			"aria-label": "Table"
		}, kind("predictions", "Predictions"), kind("failures", "Failures")), this.select("run_key", "Night", [["", `Last ${NIGHTS} days`], ...runs.map((run) => [run.run_key, runText(run)])]), !failures && this.select("label", "Class", [["", "All"], ...labels.map((name) => [name, name])]), !failures && this.range(), !failures && this.select("modality", "Modality", [["", "All"], ...modalities.map((name) => [name, modality(name)])]), failures && this.select("error_code", "Reason", [["", "All"], ...error_codes.map((name) => [name, name])]), models.length > 1 && this.select("model_id", "Model", [["", "All"], ...models.map((name) => [name, name])]), !failures && this.select("order", "Order", [
			["newest", "Newest first"],
			["probability", "Most certain first"],
			["uncertain", "Least certain first"]
		]));
	}
	switchTo(table) {
		if (this.table === table) return;
		this.table = table;
		this.offset = 0;
		this.showControls();
		this.controls.querySelector("[aria-pressed=\"true\"]").focus();
		this.load();
	}
	change(name, value) {
		this.filters[name] = value;
		this.offset = 0;
		this.load();
	}
	select(name, label, options) {
		const select = h("select", {
			id: `filter-${name}`,
			onchange: () => this.change(name, select.value)
		});
		for (const [value, text] of options) select.append(h("option", { value }, text));
		if (!options.some(([value]) => value === this.filters[name])) this.filters[name] = options[0][0];
		select.value = this.filters[name];
		return h("label", {}, label, select);
	}
	range() {
		const field = (name, label, hint) => {
			const input = h("input", {
				type: "number",
				min: 0,
				max: 1,
				step: .05,
				placeholder: hint,
				"aria-label": label,
				id: `filter-${name}`,
				onchange: () => input.checkValidity() && this.change(name, input.value)
			});
			input.value = this.filters[name];
			return input;
		};
		return h("div", {
			class: "field",
			role: "group",
			"aria-label": "Probability"
		}, h("span", {}, "Probability"), h("span", { class: "pair" }, field("min_probability", "Least probability", "0"), "–", field("max_probability", "Largest probability", "1")));
	}
	showRows() {
		if (!this.rows.length) {
			const text = this.table === "failures" ? "No object failed here." : "No image fits these filters.";
			return fill(this.body, h("div", { class: "empty" }, h("p", {}, text)));
		}
		fill(this.body, this.table === "failures" ? this.failureTable() : this.predictionTable());
	}
	predictionTable() {
		const label = this.filters.label;
		const head = [
			"Scored",
			"Modality",
			"Result",
			label ? `Probability of ${label}` : "Probability",
			"Mask area",
			"Frames",
			"Image"
		];
		return this.grid("Predictions", head, (row) => [
			h("td", { class: "time" }, localTime(row.scored_at ?? "")),
			h("td", {}, modality(row.modality ?? "")),
			h("td", { class: "strong" }, (row.predicted_label ?? "").split("|").join(", ") || (row.predicted_label === "" ? "no finding" : "–")),
			h("td", { class: "number" }, meter(row.probability ?? null)),
			h("td", { class: "number" }, maskText(row)),
			h("td", { class: "number" }, row.frames ?? ""),
			h("td", { class: "id" }, shortId(row.image_id))
		]);
	}
	failureTable() {
		return this.grid("Failures", [
			"Failed",
			"Step",
			"Reason",
			"What was found",
			"Tries",
			"Image"
		], (row) => [
			h("td", { class: "time" }, localTime(row.failed_at ?? "")),
			h("td", {}, row.stage ?? ""),
			h("td", {}, h("code", {}, row.error_code ?? "")),
			h("td", { class: "sentence" }, row.error ?? ""),
			h("td", { class: "number" }, row.attempts ?? ""),
			h("td", { class: "id" }, shortId(row.image_id))
		]);
	}
	grid(caption, head, cells) {
		const lines = this.rows.map((row) => {
			const content = cells(row);
			const first = content[0];
			fill(first, h("button", {
				class: "rowlink",
				"aria-label": `Open image ${shortId(row.image_id)}, ${first.textContent}`
			}, first.textContent));
			content.forEach((cell, index) => cell.setAttribute("data-label", head[index]));
			return h("tr", {
				onclick: () => this.open(row),
				"data-image": row.image_id
			}, ...content);
		});
		return h("table", { "aria-label": caption }, h("thead", {}, h("tr", {}, ...head.map((text) => h("th", {
			scope: "col",
			class: NUMBERS.test(text) ? "number" : null
		}, text)))), h("tbody", {}, ...lines));
	}
	showPager() {
		if (!this.total) return fill(this.pager);
		const go = (offset) => () => {
			this.offset = offset;
			this.load().then(() => this.body.scrollTo(0, 0));
		};
		const last = Math.min(this.offset + this.rows.length, this.total);
		fill(this.pager, h("span", {}, `${(this.offset + 1).toLocaleString("en")}–${last.toLocaleString("en")} of ${this.total.toLocaleString("en")}`), h("button", {
			disabled: this.offset === 0,
			onclick: go(Math.max(0, this.offset - PAGE))
		}, "Previous"), h("button", {
			disabled: last >= this.total,
			onclick: go(this.offset + PAGE)
		}, "Next"));
	}
	/** The row before or after one, on this page. */
	neighbour(imageId, by) {
		const place = this.rows.findIndex((row) => row.image_id === imageId);
		return place < 0 ? null : this.rows[place + by] ?? null;
	}
};
var NUMBERS = /^(Probability|Mask area|Frames|Tries)/;
function runText(run) {
	const job = run.job === "score" ? "" : ` ${run.job}`;
	return `${localTime(run.finished_at)}${job} · ${run.scored.toLocaleString("en")} scored, ${run.failed.toLocaleString("en")} failed`;
}
function meter(value) {
	if (value === null) return "–";
	const fillBar = h("i");
	fillBar.style.width = `${value * 100}%`;
	return h("span", { class: "meter" }, h("span", {
		class: "mini",
		"aria-hidden": "true"
	}, fillBar), h("span", { class: "digits" }, probability(value)));
}
function maskText(row) {
	if (row.mask_fraction === null || row.mask_fraction === void 0) return "–";
	if (row.mask_fraction === 0) return "none";
	return row.mask_area_mm2 === null || row.mask_area_mm2 === void 0 ? `${(row.mask_fraction * 100).toFixed(1)} %` : area(row.mask_area_mm2);
}
/** Enough of an id to tell the rows of a page apart; the whole one stands in the opened image's facts. */
var shortId = (id) => `…${id.slice(-6)}`;
// src/viewer.ts
var TOAST_MS = 5e3;
var REST_MS = 350;
var Viewer = class {
	api;
	model;
	say;
	stage;
	/** Neighbours in the worklist, while a row of it is open. */
	neighbour = () => {};
	items = [];
	item = null;
	names = false;
	case = null;
	result = null;
	resultFrame = -1;
	heatOn = false;
	opening = 0;
	resting = 0;
	toasting = 0;
	rowId = null;
	constructor(api, model, say) {
		this.api = api;
		this.model = model;
		this.say = say;
		const canvas = byId("stage");
		this.stage = new Stage(canvas);
		listen(canvas, this.stage);
		this.stage.onState = (state) => this.showState(state);
		this.stage.onCursor = (cursor) => fill(byId("corner-br"), cursor && `row ${cursor.row}, column ${cursor.column}: `, cursor && h("b", {}, cursor.value));
		this.stage.onLoading = (loading) => byId("spinner").hidden = !loading;
		this.setUpControls();
		this.welcome();
	}
	get openRow() {
		return this.rowId;
	}
	/** Open files; the first that can be shown comes up at once, the list when all are read. */
	async openFiles(files) {
		if (!files.length) return;
		const ticket = this.begin(files.length > 1 ? `Reading ${plural(files.length, "file")}` : "Reading the file");
		let shown = null;
		const items = await readFiles(this.api, files, (item) => {
			if (ticket !== this.opening) return;
			shown = item;
			if (files.length === 1) this.openItem(item);
			else this.preview(item, ticket);
		}, (done, all) => {
			if (ticket === this.opening && all > 1 && done < all) fill(byId("files"), h("p", { class: "fine busy" }, `Reading ${done} of ${all}`));
		});
		if (ticket !== this.opening && !(files.length === 1 && shown)) return;
		this.items = items;
		if (files.length === 1) {
			if (!shown) this.refuse(items[0]);
			return this.showItems();
		}
		const first = items.find((item) => !item.problem) ?? items[0];
		if (files.length > items[0].files.length) this.say(`${plural(items.length, "item")} open`);
		await this.openItem(first);
	}
	/** Open a row of the worklist: its picture from the archive, its result from the table. */
	async openRowOf(row) {
		const ticket = this.begin("Reading the image from the archive");
		this.items = [];
		this.showItems();
		this.rowId = row.image_id;
		let record;
		try {
			record = await this.api.record(row.image_id, row.model_id);
		} catch (problem) {
			if (ticket === this.opening) this.refuseWith("The row cannot be read", problem);
			return;
		}
		if (ticket !== this.opening) return;
		const failed = record.table === "failures";
		const result = failed ? null : resultOf(record);
		if (failed) this.showFailure(record);
		else showResult(byId("result"), result, null, whenOf(record));
		this.showRowFacts(record);
		try {
			const fetchChunk = (first) => this.api.sourcePixels(row.image_id, first);
			const source = new ObjectSource(parse(await fetchChunk(0)), fetchChunk);
			if (ticket !== this.opening) return;
			const answer = result && Promise.resolve(result);
			await this.showCase({
				source,
				result: () => answer,
				perFrame: false,
				scored: whenOf(record)
			}, ticket);
			this.showRowFacts(record);
		} catch (problem) {
			if (ticket === this.opening) this.refuseWith("The image cannot be shown", problem, failed);
		}
	}
	/** The result anew, as by another model; window and zoom stay. */
	rescore() {
		if (!this.case || this.case.scored !== null) return;
		this.result = null;
		this.stage.layers.contours = null;
		this.setHeat(null);
		this.score();
	}
	/** Said to those who look and to those who listen, for a while. */
	notify(text) {
		const toast = byId("toast");
		toast.textContent = text;
		toast.hidden = false;
		clearTimeout(this.toasting);
		this.toasting = window.setTimeout(() => toast.hidden = true, TOAST_MS);
		this.say(text);
	}
	toggleMask() {
		this.setMask(!this.stage.layers.showMask);
	}
	toggleHeat() {
		if (byId("heat").disabled) return;
		this.heatOn = !this.heatOn;
		byId("heat").setAttribute("aria-pressed", String(this.heatOn));
		this.updateHeat();
	}
	preset(index) {
		const preset = PRESETS[index];
		if (preset && this.stage.current?.source.header.unit === "HU") this.stage.setWindow(preset[1], preset[2]);
	}
	nextItem(by) {
		if (this.rowId) return this.neighbour(by);
		const place = this.item ? this.items.indexOf(this.item) : -1;
		const next = this.items[place + by];
		if (place >= 0 && next) this.openItem(next);
	}
	begin(text) {
		this.opening++;
		this.case = this.result = this.item = this.rowId = null;
		this.stage.clear();
		this.forget();
		fill(byId("message"), h("p", { class: "busy" }, text));
		fill(byId("facts"));
		fill(byId("result"));
		return this.opening;
	}
	async preview(item, ticket) {
		const source = await item.open();
		if (ticket !== this.opening) return;
		fill(byId("message"));
		this.label(source);
		await this.stage.show(source, 0);
	}
	async openItem(item) {
		const ticket = this.begin("Reading the file");
		this.item = item;
		this.showItems();
		if (item.problem) return this.refuse(item);
		try {
			const source = await item.open();
			if (ticket !== this.opening) return;
			const asked = /* @__PURE__ */ new Map();
			const result = (frame, explain) => {
				const file = item.files[source.fileOf(frame)];
				const model = this.model();
				const key = `${source.fileOf(frame)} ${explain} ${model}`;
				const found = asked.get(key) ?? typeOf(file).then((type) => this.api.predict(file, type, model, explain));
				asked.set(key, found);
				found.catch(() => asked.delete(key));
				return found;
			};
			await this.showCase({
				source,
				result,
				perFrame: item.files.length > 1,
				scored: null
			}, ticket);
		} catch (problem) {
			if (ticket === this.opening) this.refuseWith("The file cannot be shown", problem);
		}
	}
	async showCase(opened, ticket) {
		this.case = opened;
		const { source } = opened;
		fill(byId("message"));
		this.label(source);
		showFacts(byId("facts"), source.header, source.count);
		await this.stage.show(source, opened.perFrame ? Math.floor(source.count / 2) : 0);
		if (ticket !== this.opening) return;
		this.say(`${kindOf(source.header)} image, ${source.header.width} by ${source.header.height}, ${plural(source.count, "frame")}`);
		await this.score();
	}
	/** Ask for the result of what is on the stage, and show it. */
	async score() {
		const [opened, ticket] = [this.case, this.opening];
		const current = this.stage.current;
		if (!opened || !current) return;
		const asked = opened.result(current.frame, false);
		if (!asked) return;
		if (!this.result || opened.perFrame) waiting(byId("result"), "Scoring");
		try {
			const result = await asked;
			if (ticket !== this.opening || this.case !== opened || opened.perFrame && this.stage.current?.frame !== current.frame) return;
			const first = this.result === null;
			this.result = result;
			this.resultFrame = current.frame;
			this.showFrameResult();
			if (first && !opened.perFrame && current.position === 0 && result.frames.length > 1) await this.stage.goTo(current.source.positionOf(result.key_frame));
			this.drawStrip();
			this.say(`Model output: ${result.predicted_label || "no finding"} ${result.predicted_probability === null ? "" : probability(result.predicted_probability)}`);
		} catch (problem) {
			if (ticket === this.opening) problemCard(byId("result"), "No result", problem, () => void this.score());
		}
		if (ticket === this.opening) await this.updateHeat();
	}
	frameResult() {
		const frame = this.stage.current?.frame ?? 0;
		return this.result?.frames.find((item, index) => (item.frame ?? index) === frame) ?? null;
	}
	showFrameResult() {
		const { result } = this;
		if (!result) return;
		const frame = this.frameResult();
		const mask = result.frames.length > 1 ? frame?.mask ?? null : result.mask;
		showResult(byId("result"), result, frame, this.case?.scored);
		this.stage.layers.contours = mask?.contours ?? null;
		byId("mask").disabled = byId("mask-opacity").disabled = result.mask === null;
		this.stage.redraw();
	}
	async updateHeat() {
		const [opened, ticket, current] = [
			this.case,
			this.opening,
			this.stage.current
		];
		const button = byId("heat");
		const slider = byId("heat-opacity");
		button.disabled = slider.disabled = !opened || opened.scored !== null;
		button.title = opened?.scored ? "Rows of the tables hold no explanation; open the file itself" : "Which pixels spoke for the predicted class";
		if (!this.heatOn || !opened || !current || opened.scored !== null) return this.setHeat(null);
		try {
			const result = await opened.result(current.frame, true);
			const picture = result?.explanation ? await heatPicture(result.explanation.png) : null;
			if (ticket !== this.opening) return;
			const wanted = opened.perFrame || current.source.count === 1 ? current.frame : result?.key_frame ?? 0;
			this.setHeat(this.heatOn && this.stage.current?.frame === wanted ? picture : null, result?.explanation?.class);
			if (!picture) this.noHeat("This server's answer holds no explanation.");
		} catch (problem) {
			if (ticket === this.opening) this.noHeat(`No explanation: ${wordsOf(problem).detail}`);
		}
	}
	noHeat(why) {
		this.heatOn = false;
		byId("heat").setAttribute("aria-pressed", "false");
		this.setHeat(null);
		this.notify(why);
	}
	setHeat(picture, about = "") {
		byId("heat-note").textContent = picture ? `Grad-CAM: ${about}` : "";
		this.stage.layers.heat = picture;
		byId("stage").dataset.heat = picture ? "on" : "off";
		this.stage.redraw();
	}
	setMask(on) {
		this.stage.layers.showMask = on;
		byId("mask").setAttribute("aria-pressed", String(on));
		byId("stage").dataset.mask = on ? "on" : "off";
		this.stage.redraw();
		this.say(on ? "Mask shown" : "Mask hidden");
	}
	/** What changes with the frame, the window and the zoom. */
	showState(state) {
		const slider = byId("slice");
		slider.max = String(state.count);
		slider.value = String(state.position + 1);
		slider.setAttribute("aria-valuetext", `${state.position + 1} of ${state.count}`);
		byId("slice-number").textContent = `${state.position + 1} / ${state.count}`;
		byId("slices").hidden = state.count < 2;
		const numbers = [windowNumber(state.window.center), windowNumber(state.window.width)];
		for (const [index, id] of ["center", "width"].entries()) {
			const field = byId(id);
			if (document.activeElement !== field) field.value = numbers[index];
		}
		byId("invert").setAttribute("aria-pressed", String(state.invert));
		byId("preset").value = this.presetOf(state);
		const unit = this.stage.current?.source.header.unit;
		byId("corner-bl").textContent = `C ${numbers[0]}  W ${numbers[1]}${unit ? ` ${unit}` : ""}${state.invert ? "  inverted" : ""}  ·  ${Math.round(state.zoom * 100)} %`;
		byId("corner-tr").textContent = state.count > 1 ? `${state.position + 1} / ${state.count}` : "";
		const canvas = byId("stage");
		canvas.dataset.center = String(state.window.center);
		canvas.dataset.width = String(state.window.width);
		const frame = this.stage.current?.frame ?? 0;
		if (this.case && this.result && frame !== this.resultFrame) this.frameChanged();
	}
	frameChanged() {
		const opened = this.case;
		clearTimeout(this.resting);
		if (!opened.perFrame) {
			this.resultFrame = this.stage.current.frame;
			this.showFrameResult();
			this.drawStrip();
			this.updateHeat();
			return;
		}
		this.stage.layers.contours = null;
		this.setHeat(null);
		this.resting = window.setTimeout(() => void this.score(), REST_MS);
	}
	presetOf(state) {
		if (state.ownWindow) return "file";
		const found = PRESETS.findIndex(([, center, width]) => center === state.window.center && width === state.window.width);
		return found >= 0 ? String(found) : "custom";
	}
	/** Over the frame slider: how much of each frame the mask covers. */
	drawStrip() {
		const strip = byId("strip");
		const current = this.stage.current;
		const frames = this.result?.frames ?? [];
		fill(strip);
		if (!current || frames.length < 2) return;
		const most = Math.max(...frames.map((frame) => frame.mask?.fraction ?? 0));
		strip.setAttribute("viewBox", `0 0 ${current.source.count} 1`);
		if (!most) return;
		for (const [index, frame] of frames.entries()) {
			const high = (frame.mask?.fraction ?? 0) / most;
			const bar = document.createElementNS(strip.namespaceURI, "rect");
			const at = {
				x: current.source.positionOf(frame.frame ?? index) + .1,
				y: 1 - high,
				width: .8,
				height: high
			};
			for (const [name, value] of Object.entries(at)) bar.setAttribute(name, String(value));
			strip.append(bar);
		}
	}
	label(source) {
		const { header } = source;
		byId("stage").setAttribute("aria-label", `${kindOf(header)} image, ${header.width} by ${header.height} pixels, ${plural(source.count, "frame")}`);
		byId("corner-tl").textContent = `${kindOf(header)}  ${header.width} × ${header.height}`;
		for (const side of [
			"left",
			"right",
			"top",
			"bottom"
		]) byId(`edge-${side}`).textContent = header.edges?.[side] ?? "";
		for (const option of byId("preset").options) if (option.dataset.hu) option.hidden = option.disabled = header.unit !== "HU";
		document.body.classList.toggle("open", true);
	}
	/** Nothing is on the stage: what was said of the last picture goes. */
	forget() {
		for (const id of [
			"corner-tl",
			"corner-tr",
			"corner-bl",
			"corner-br",
			"edge-left",
			"edge-right",
			"edge-top",
			"edge-bottom"
		]) byId(id).textContent = "";
		byId("stage").setAttribute("aria-label", "No image is open");
		byId("slices").hidden = true;
		byId("spinner").hidden = true;
		this.resultFrame = -1;
		clearTimeout(this.resting);
		this.setHeat(null);
		document.body.classList.toggle("open", false);
	}
	refuse(item) {
		this.item = item;
		this.showItems();
		this.refuseWith("The file cannot be shown", item.problem);
		fill(byId("result"), h("div", { class: "card muted" }, "Nothing was scored. In a nightly run this object would stand in the failures table under the same code."));
	}
	refuseWith(title, problem, quiet = false) {
		this.stage.clear();
		this.forget();
		const { code, detail } = wordsOf(problem);
		const retry = problem instanceof Problem && (problem.status === 0 || problem.status === 503 || problem.status === 401);
		fill(byId("message"), h("div", {
			class: "refusal",
			role: quiet ? null : "alert"
		}, h("h2", {}, title), h("p", {}, detail), code && h("p", {}, h("code", {}, code)), !retry && !this.rowId && h("button", { onclick: () => byId("file-input").click() }, "Open another file"), retry && this.item && h("button", { onclick: () => this.item && void this.openFiles(this.item.files) }, "Try again")));
	}
	welcome() {
		fill(byId("message"), h("div", { class: "welcome" }, h("h1", {}, "Drop an image here"), h("p", {}, "DICOM, NIfTI, PNG, JPEG, TIFF or BMP, one file or a folder with a series."), h("div", { class: "actions" }, h("button", {
			class: "primary",
			onclick: () => byId("file-input").click()
		}, "Open file"), h("button", { onclick: () => byId("folder-input").click() }, "Open folder")), h("p", { class: "fine" }, "Files go to this server and nowhere else. Their names stay in this browser.")));
		fill(byId("result"), h("div", { class: "card muted" }, h("p", {}, "The model's output appears here: probabilities with their operating points, the mask and its area.")));
	}
	showItems() {
		showList(byId("files"), this.items, this.item, this.names, (item) => void this.openItem(item), (on) => {
			this.names = on;
			this.showItems();
			byId("names").focus();
		});
	}
	showFailure(record) {
		fill(byId("result"), h("section", { class: "card problem" }, h("h2", {}, "Not scored"), h("p", {}, String(record.error ?? "")), list([
			["Reason", h("code", {}, String(record.error_code))],
			["Step", String(record.stage)],
			["Tries", String(record.attempts)]
		])));
	}
	showRowFacts(record) {
		const section = h("section", {
			class: "card",
			"aria-label": "Worklist row",
			id: "row"
		}, h("h3", {}, "Worklist row"), list([
			["Image", h("code", { class: "whole" }, record.image_id)],
			["Run date", record.run_date],
			["Model", h("code", {}, record.model_id)]
		]), h("div", { class: "actions spread" }, h("button", {
			onclick: () => this.neighbour(-1),
			title: "K"
		}, "Previous"), h("button", {
			onclick: () => this.neighbour(1),
			title: "J"
		}, "Next")));
		document.getElementById("row")?.remove();
		byId("facts").append(section);
		section.setAttribute("aria-description", `Image ${shortId(record.image_id)}`);
	}
	setUpControls() {
		const preset = byId("preset");
		preset.append(h("option", { value: "file" }, "From file"), h("option", { value: "auto" }, "Automatic"));
		for (const [index, [name, center, width]] of PRESETS.entries()) preset.append(h("option", {
			value: index,
			"data-hu": "yes"
		}, `${name} ${center}/${width}`));
		preset.append(h("option", {
			value: "custom",
			hidden: true
		}, "By hand"));
		preset.addEventListener("change", () => {
			if (preset.value === "file") this.stage.fileWindow();
			else if (preset.value === "auto") this.stage.automaticWindow();
			else this.preset(Number(preset.value));
		});
		const [center, width] = [byId("center"), byId("width")];
		for (const field of [center, width]) field.addEventListener("change", () => this.stage.setWindow(center.valueAsNumber, width.valueAsNumber));
		byId("invert").addEventListener("click", () => this.stage.invert());
		byId("fit").addEventListener("click", () => this.stage.fit());
		byId("one").addEventListener("click", () => this.stage.oneToOne());
		byId("mask").addEventListener("click", () => this.toggleMask());
		byId("heat").addEventListener("click", () => this.toggleHeat());
		const share = (id, take) => {
			const slider = byId(id);
			slider.addEventListener("input", () => {
				take(Number(slider.value) / 100);
				this.stage.redraw();
			});
		};
		share("mask-opacity", (value) => this.stage.layers.maskOpacity = value);
		share("heat-opacity", (value) => this.stage.layers.heatOpacity = value);
		const slider = byId("slice");
		slider.addEventListener("input", () => void this.stage.goTo(Number(slider.value) - 1));
	}
};
var whenOf = (record) => localTime(String(record.scored_at ?? ""));
/** A row of the tables in the form of the API's answer. */
function resultOf(record) {
	return {
		model_id: record.model_id,
		preprocess_id: record.preprocess_id,
		predicted_label: record.predicted_label,
		predicted_probability: record.predicted_probability,
		classes: record.classes,
		key_frame: record.key_frame,
		mask: record.mask,
		frames: record.frame_results
	};
}
// src/main.ts
var api = new Api(document.baseURI, askForToken);
var status = byId("status");
var say = (text) => void (status.textContent = text);
var models = byId("model");
var model = () => models.value || null;
var viewer = new Viewer(api, model, say);
var worklist = new Worklist(byId("worklist"), api, (row) => openRow(row), say);
var tabs = {
	view: byId("tab-view"),
	worklist: byId("tab-worklist")
};
function show(tab, focus = false) {
	for (const name of Object.keys(tabs)) {
		const on = name === tab;
		tabs[name].setAttribute("aria-selected", String(on));
		tabs[name].tabIndex = on ? 0 : -1;
		byId(name).hidden = !on;
	}
	if (focus) tabs[tab].focus();
	history.replaceState(null, "", tab === "view" ? location.pathname + location.search : "#worklist");
	if (tab === "worklist") worklist.refresh();
}
function openRow(row) {
	show("view");
	byId("stage").focus({ preventScroll: true });
	viewer.openRowOf(row);
}
viewer.neighbour = (by) => {
	const next = viewer.openRow && worklist.neighbour(viewer.openRow, by);
	if (next) openRow(next);
	else viewer.notify("No more rows on this page of the worklist.");
};
for (const name of Object.keys(tabs)) {
	tabs[name].addEventListener("click", () => show(name));
	tabs[name].addEventListener("keydown", (event) => {
		if (event.key === "ArrowRight" || event.key === "ArrowLeft") show(name === "view" ? "worklist" : "view", true);
	});
}
async function loadModels() {
	try {
		const found = await api.models();
		fill(models);
		for (const one of found) models.append(h("option", {
			value: one.id,
			selected: one.default
		}, one.id));
		byId("model-label").classList.toggle("single", found.length < 2);
	} catch (problem) {
		fill(models, h("option", { value: "" }, "no model"));
		if (problem instanceof Problem && problem.status !== 401) say(wordsOf(problem).detail);
	}
}
async function showCard() {
	const dialog = byId("card-dialog");
	fill(byId("card"), h("p", { class: "busy" }, "Reading the card"));
	dialog.showModal();
	try {
		fill(byId("card"), ...render(await api.card(model() ?? "")));
	} catch (problem) {
		fill(byId("card"), h("h2", {}, "No model card"), h("p", {}, wordsOf(problem).detail));
	}
}
function setUpOpening() {
	const [file, folder] = [byId("file-input"), byId("folder-input")];
	byId("open-file").addEventListener("click", () => file.click());
	byId("open-folder").addEventListener("click", () => folder.click());
	for (const input of [file, folder]) input.addEventListener("change", () => void viewer.openFiles(chosen(input)));
	let inside = 0;
	const mark = (by) => {
		inside = Math.max(0, inside + by);
		document.body.classList.toggle("dragging", inside > 0);
	};
	document.addEventListener("dragenter", () => mark(1));
	document.addEventListener("dragleave", () => mark(-1));
	document.addEventListener("dragover", (event) => event.preventDefault());
	document.addEventListener("drop", (event) => {
		event.preventDefault();
		mark(-inside);
		if (!event.dataTransfer) return;
		show("view");
		dropped(event.dataTransfer).then((files) => viewer.openFiles(files));
	});
}
function setUpDialogs() {
	for (const dialog of document.querySelectorAll("dialog")) {
		dialog.querySelector(".close")?.addEventListener("click", () => dialog.close());
		dialog.addEventListener("click", (event) => event.target === dialog && dialog.id !== "token-dialog" && dialog.close());
	}
	for (const button of document.querySelectorAll(".close")) fill(button, icon("M5 5l10 10M15 5L5 15"));
	byId("card-open").addEventListener("click", () => void showCard());
	byId("help-open").addEventListener("click", help);
	fill(byId("help-open"), icon("M7.500 7.500a2.500 2.500 0 1 1 3.600 2.200c-.8.4-1.100.9-1.100 1.800M10 14.500v.1"));
}
var { stage } = viewer;
var actions = [
	{
		keys: ["ArrowUp", "PageUp"],
		shown: "↑ PgUp",
		what: "Previous frame; zoom in where there is one frame",
		do: () => move(-1)
	},
	{
		keys: ["ArrowDown", "PageDown"],
		shown: "↓ PgDn",
		what: "Next frame; zoom out where there is one frame",
		do: () => move(1)
	},
	{
		keys: ["Home"],
		shown: "Home",
		what: "First frame",
		do: () => void stage.goTo(0)
	},
	{
		keys: ["End"],
		shown: "End",
		what: "Last frame",
		do: () => void stage.goTo(Infinity)
	},
	{
		keys: ["+", "="],
		shown: "+",
		what: "Zoom in",
		do: () => stage.zoom(1.25)
	},
	{
		keys: ["-"],
		shown: "-",
		what: "Zoom out",
		do: () => stage.zoom(.8)
	},
	{
		keys: ["f", "0"],
		shown: "F",
		what: "Fit to the stage",
		do: () => stage.fit()
	},
	{
		keys: ["o"],
		shown: "O",
		what: "One image pixel to one screen pixel",
		do: () => stage.oneToOne()
	},
	{
		keys: ["Shift+ArrowLeft"],
		shown: "Shift ←",
		what: "Move the picture; likewise → ↑ ↓",
		do: () => stage.pan(-40, 0)
	},
	{
		keys: ["Shift+ArrowRight"],
		shown: "",
		what: "",
		do: () => stage.pan(40, 0)
	},
	{
		keys: ["Shift+ArrowUp"],
		shown: "",
		what: "",
		do: () => stage.pan(0, -40)
	},
	{
		keys: ["Shift+ArrowDown"],
		shown: "",
		what: "",
		do: () => stage.pan(0, 40)
	},
	{
		keys: ["["],
		shown: "[",
		what: "Narrower window (more contrast)",
		do: () => stage.nudgeWindow(0, -.1)
	},
	{
		keys: ["]"],
		shown: "]",
		what: "Wider window (less contrast)",
		do: () => stage.nudgeWindow(0, .1)
	},
	{
		keys: [","],
		shown: ",",
		what: "Lower window centre (brighter)",
		do: () => stage.nudgeWindow(-.05, 0)
	},
	{
		keys: ["."],
		shown: ".",
		what: "Higher window centre (darker)",
		do: () => stage.nudgeWindow(.05, 0)
	},
	{
		keys: ["r"],
		shown: "R",
		what: "The file's own window",
		do: () => stage.fileWindow()
	},
	{
		keys: ["a"],
		shown: "A",
		what: "Window from this frame's values",
		do: () => stage.automaticWindow()
	},
	{
		keys: ["1"],
		shown: "1 … 5",
		what: "CT windows: soft tissue, lung, bone, brain, liver",
		do: () => viewer.preset(0)
	},
	...[
		"2",
		"3",
		"4",
		"5"
	].map((key, index) => ({
		keys: [key],
		shown: "",
		what: "",
		do: () => viewer.preset(index + 1)
	})),
	{
		keys: ["i"],
		shown: "I",
		what: "Invert",
		do: () => stage.invert()
	},
	{
		keys: ["m"],
		shown: "M",
		what: "Mask on or off",
		do: () => viewer.toggleMask()
	},
	{
		keys: ["g"],
		shown: "G",
		what: "Grad-CAM on or off",
		do: () => viewer.toggleHeat()
	},
	{
		keys: ["j"],
		shown: "J",
		what: "Next open file, or next row of the worklist",
		do: () => viewer.nextItem(1)
	},
	{
		keys: ["k"],
		shown: "K",
		what: "Previous one",
		do: () => viewer.nextItem(-1)
	},
	{
		keys: ["w"],
		shown: "W",
		what: "Worklist",
		do: () => show("worklist", true)
	},
	{
		keys: ["?"],
		shown: "?",
		what: "These keys",
		do: help
	}
];
function move(by) {
	if ((stage.current?.source.count ?? 1) > 1) stage.step(by);
	else stage.zoom(by < 0 ? 1.25 : .8);
}
function help() {
	showHelp(byId("help"), actions.filter((action) => action.shown));
	byId("help-dialog").showModal();
}
setUpTheme(byId("theme"));
setUpOpening();
setUpDialogs();
listenToKeys(actions, () => !byId("view").hidden);
models.addEventListener("change", () => viewer.rescore());
loadModels();
if (location.hash === "#worklist") show("worklist");
