// Package archtest holds the tests of the source itself: imports point down the layers, siblings do not know each
// other, some packages of others stay where they belong, and lock annotations are written so that the tool that checks
// them sees them. The tables are at the top of the tests. Test files may import what they like: they stand above
// everything.
package archtest
