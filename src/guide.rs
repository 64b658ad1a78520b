//! How to use gensync, and what can go wrong.

// If a link is defined twice, Markdown takes the first definition. So links.md comes first: its links lead to the items of this
// crate. The definitions in each chapter lead to files, and apply where the chapter is read on a code host.

#[doc = include_str!("../docs/links.md")]
#[doc = include_str!("../docs/which-call.md")]
pub mod which_call {}

#[doc = include_str!("../docs/links.md")]
#[doc = include_str!("../docs/where-to-put-the-table.md")]
pub mod where_to_put_the_table {}

#[doc = include_str!("../docs/links.md")]
#[doc = include_str!("../docs/what-can-go-wrong.md")]
pub mod what_can_go_wrong {}

#[doc = include_str!("../docs/links.md")]
#[doc = include_str!("../docs/what-was-tried.md")]
pub mod what_was_tried {}

#[doc = include_str!("../docs/links.md")]
#[doc = include_str!("../docs/for-operators.md")]
pub mod for_operators {}

#[doc = include_str!("../docs/links.md")]
#[doc = include_str!("../docs/measurements.md")]
pub mod measurements {}

#[doc = include_str!("../docs/links.md")]
#[doc = include_str!("../docs/side-by-side.md")]
#[doc = include_str!("../docs/side-by-side/peers.md")]
pub mod side_by_side {}

#[doc = include_str!("../docs/links.md")]
#[doc = include_str!("../docs/from-djblets.md")]
pub mod from_djblets {}
