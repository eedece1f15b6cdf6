// Numbers and names as people read them.

/** A probability with two digits, three near the ends: 0.83, 0.997, 0.002. */
export function probability(value: number): string {
  if (value >= 0.9995 && value < 1) return ">0.999";
  if (value > 0 && value < 0.0005) return "<0.001";
  const nearAnEnd = (value > 0.99 && value < 1) || (value > 0 && value < 0.01);
  return value.toFixed(nearAnEnd ? 3 : 2);
}

export function area(mm2: number): string {
  return mm2 >= 1000 ? `${(mm2 / 100).toFixed(1)} cm²` : `${mm2.toFixed(mm2 < 10 ? 1 : 0)} mm²`;
}

export function share(fraction: number): string {
  const percent = fraction * 100;
  return `${percent < 10 ? percent.toFixed(1) : percent.toFixed(0)} %`;
}

/** A window's number: whole where it is large, else as many digits as it needs. */
export function windowNumber(value: number): string {
  return Math.abs(value) >= 100 || Number.isInteger(value) ? String(Math.round(value)) : String(Number(value.toPrecision(4)));
}

/** `2026-11-26 01:54` of an ISO time, in the browser's zone. */
export function localTime(iso: string): string {
  const time = new Date(iso);
  if (Number.isNaN(time.getTime())) return iso;
  const two = (value: number) => String(value).padStart(2, "0");
  return `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())} ${two(time.getHours())}:${two(time.getMinutes())}`;
}

const SPACING: Record<string, string> = {
  pixel_spacing: "",
  calibrated: "calibrated",
  unverified: "not verified",
  imager: "at the detector",
  nominal_scanned: "on the scanned film",
  affine: "",
  none: "",
};

/** Pixel spacing with where it holds: `0.70 × 0.70 mm`, `0.14 × 0.14 mm at the detector`. */
export function spacing(mm: [number, number] | null | undefined, source: string): string {
  if (!mm) return "not known";
  const where = SPACING[source] ?? source;
  return `${mm[0].toPrecision(3)} × ${mm[1].toPrecision(3)} mm${where ? ` ${where}` : ""}`;
}

const MODALITIES: Record<string, string> = {
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
  OT: "Other",
};

export function modality(code: string): string {
  return MODALITIES[code] ?? code;
}

/** What a picture is called in few words: its modality, or its format where the file names none. */
export function kindOf(header: { modality: string; format: string }): string {
  return header.modality === "OT" ? header.format.toUpperCase() : modality(header.modality);
}

export function plural(count: number, one: string): string {
  return `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;
}
