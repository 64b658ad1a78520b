//! Durations and times as people write them.

use std::time::{Duration, SystemTime};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// A duration such as `500ms`, `30s` or `1h 30m`; a number without a unit is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let is_number = text.starts_with(|first: char| first.is_ascii_digit() || first == '.')
        && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let duration = if is_number {
        text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
    } else {
        text.parse::<SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok())
    };
    duration.ok_or_else(|| "expected a time, such as 30 or 30s for seconds, 500ms, 2m or 1h 30m".to_owned())
}

/// A duration for people, by its greatest unit.
pub(crate) fn rough(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7200 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// The local time, to the second.
pub(crate) fn local(time: SystemTime) -> String {
    format(time, "%F %T")
}

/// The local time, to the millisecond, with the offset of the time zone.
pub(crate) fn precise(time: SystemTime) -> String {
    format(time, "%FT%T%.3f%:z")
}

fn format(time: SystemTime, format: &str) -> String {
    match Timestamp::try_from(time) {
        Ok(time) => time.to_zoned_datetime(TimeZone::system()).strftime(format).to_string(),
        Err(_) => "unknown".to_owned(),
    }
}

/// Seconds since the epoch.
pub(crate) fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}
