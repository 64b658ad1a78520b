//! Durations and times as people write them.

use std::time::{Duration, SystemTime};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// A duration such as `500ms`, `30s` or `1h 30m`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let duration = text.parse::<SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok());
    duration.ok_or_else(|| "expected a time with its unit, such as 500ms, 30s or 2m".to_owned())
}

/// The time on the wall here, to the second.
pub(crate) fn local(time: SystemTime) -> String {
    format(time, "%F %T")
}

/// The time on the wall here, to the millisecond, with the offset of the time zone.
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
