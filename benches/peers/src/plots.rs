//! The plots.
pub(crate) fn draw(_results: &crate::results::Results, _folder: &std::path::Path) -> crate::Outcome<()> { Ok(()) }
