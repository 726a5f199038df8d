// Numbers, durations and times as the page writes them.

const PREFIXES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  for (const [factor, prefix] of PREFIXES) {
    if (size >= factor * 10 || (size >= factor && factor > 1e3)) return trim(value / factor, digits) + prefix;
  }
  return size >= 1000 ? Math.round(value).toLocaleString("en") : trim(value, digits);
}

function trim(value, digits) {
  return value === 0 ? "0" : String(Number(value.toPrecision(digits)));
}

export function bytes(value) {
  return value === null || value === undefined ? "–" : number(value).replace(/[kMGT]?$/, " $&B");
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${Math.round(100 * value)} %`;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const days = Math.floor(whole / 86400), hours = Math.floor(whole / 3600) % 24;
  const minutes = Math.floor(whole / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  if (minutes) return minutes < 10 ? `${minutes} min ${whole % 60} s` : `${minutes} min`;
  return `${whole} s`;
}

export function clock(unix) {
  const date = new Date(unix * 1000);
  const time = date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  if (date.toDateString() === new Date().toDateString()) return time;
  return date.toLocaleDateString("en-GB", { weekday: "short", day: "numeric", month: "short" }) + ", " + time;
}
